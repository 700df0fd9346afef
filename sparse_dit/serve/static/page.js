// The server's page: submits the form, follows a job, compares two videos. Needs no library.
"use strict";

const byId = (id) => document.getElementById(id);
const calm = window.matchMedia("(prefers-reduced-motion: reduce)");
const POLL = 500; // milliseconds between two looks at a job
const HEALTH = 3000; // between two looks at the workers
const PATIENCE = 5000; // at most, while the server doesn't answer
const SYNCED = 0.06; // seconds that two videos may be apart

async function ask(address, options) {
  const answer = await fetch(address, { credentials: "same-origin", ...options });
  if (answer.status === 401) {
    location.reload(); // which asks for the key
    return new Promise(() => {});
  }
  let body = null;
  try {
    body = await answer.json();
  } catch {
    if (answer.ok) throw new TypeError("the answer is cut off");
  }
  return { status: answer.status, ok: answer.ok, body };
}

function reason(answer) {
  const said = answer.body && answer.body.error ? answer.body.error.message : null;
  return said || `The server answered with status ${answer.status}.`;
}

const sleep = (milliseconds) => new Promise((done) => setTimeout(done, milliseconds));

function duration(seconds) {
  if (seconds < 1) return "less than a second";
  if (seconds < 90) return `${Math.round(seconds)} s`;
  if (seconds < 5400) return `${Math.round(seconds / 60)} min`;
  return `${(seconds / 3600).toFixed(1)} h`;
}

/* ---- a job that waits or runs ---- */

function follow(section) {
  const address = section.dataset.address;
  const seen = { status: section.dataset.status, left: null, at: 0, spoken: "", beats: 0 };
  byId("cancel").addEventListener("click", () => cancel(address));
  watch();

  async function watch() {
    let wait = POLL;
    for (;;) {
      let answer = null;
      try {
        answer = await ask(address);
      } catch {
        // no answer at all
      }
      const there = answer !== null && answer.status < 500;
      byId("trouble").hidden = there;
      if (there) {
        wait = POLL;
        if (!answer.ok || !["queued", "in_progress"].includes(answer.body.status)) {
          if (await redraw()) return;
        } else {
          show(answer.body);
        }
      } else {
        wait = Math.min(PATIENCE, wait * 1.5);
      }
      await sleep(wait);
    }
  }

  function show(job) {
    const waits = job.status === "queued";
    byId("state").textContent = job.cancelling ? "Cancelling" : waits ? "Waiting" : phase(job);
    byId("bar").value = job.step;
    byId("step").textContent = job.step;
    byId("attempt").textContent = job.attempt > 1 ? `, begun ${job.attempt} times` : "";
    byId("left").textContent = waits ? place(job) : left(job);
    if (job.cancelling) byId("cancel").disabled = true;
    if (seen.status !== job.status) refreshHistory();
    seen.status = job.status;
    previews(job);
    speak(job, waits);
    seen.beats += 1;
    if (waits && seen.beats % 6 === 1) health();
  }

  function phase(job) {
    const words = { sparse: "Running, sparse", dense: "Running, dense", writing: "Writing the files" };
    return words[job.phase] || "Starting";
  }

  function place(job) {
    const ahead = job.queue_position - 1;
    const where = ahead === 0 ? "next in the queue" : `${ahead} ahead of it in the queue`;
    return seen.health ? `${where}; ${seen.health}` : where;
  }

  async function health() {
    try {
      const { body } = await ask("/health");
      const words = { loading: "the model is being loaded", failing: "no worker is ready" };
      seen.health = words[body.status] || "";
    } catch {
      seen.health = "";
    }
  }

  function left(job) {
    const key = `${job.step} ${job.seconds_left}`;
    if (seen.left !== key) {
      seen.left = key;
      seen.at = Date.now();
    }
    if (job.seconds_left === null || job.phase === "writing") return "";
    return `about ${duration(Math.max(0, job.seconds_left - (Date.now() - seen.at) / 1000))} left`;
  }

  function previews(job) {
    const list = byId("previews");
    const wanted = `${job.attempt}: ${job.previews.join(" ")}`;
    if (seen.previews === wanted) return;
    seen.previews = wanted;
    list.replaceChildren(
      ...job.previews.map((step) => {
        const picture = document.createElement("img");
        Object.assign(picture, { src: `${address}/previews/${step}`, width: 128, height: 128 });
        const words = document.createElement("span");
        words.textContent = stepName(job, step);
        picture.alt = `Latents, ${words.textContent}`;
        const item = document.createElement("li");
        item.append(picture, words);
        return item;
      }),
    );
  }

  function stepName(job, step) {
    if (!job.compare) return `step ${step}`;
    const first = job.num_inference_steps;
    return step > first ? `dense, step ${step - first}` : `sparse, step ${step}`;
  }

  // what is read aloud: each change of state, and each quarter of the way
  function speak(job, waits) {
    const quarter = Math.floor((4 * job.step) / Math.max(1, job.steps));
    const key = waits ? `waits ${job.queue_position}` : `${job.phase} ${quarter}`;
    if (key === seen.spoken) return;
    seen.spoken = key;
    const done = waits ? "" : `, ${job.step} of ${job.steps} steps`;
    byId("said").textContent =
      `${byId("state").textContent}${done}. ${byId("left").textContent}`;
  }
}

async function cancel(address) {
  const button = byId("cancel");
  button.disabled = true;
  byId("cancel-wrong").textContent = "";
  try {
    const answer = await ask(`${address}/cancel`, { method: "POST" });
    if (answer.ok) return;
    byId("cancel-wrong").textContent = reason(answer);
  } catch {
    byId("cancel-wrong").textContent = "The server doesn't answer; try again.";
  }
  button.disabled = false;
}

// the job and the list as the server draws them now; whether it could be asked
async function redraw() {
  let text = null;
  try {
    text = await (await fetch(location.href, { credentials: "same-origin" })).text();
  } catch {
    return false;
  }
  const made = new DOMParser().parseFromString(text, "text/html");
  const job = made.getElementById("job");
  if (!job) return false;
  const focused = byId("job").contains(document.activeElement);
  byId("job").replaceWith(document.adoptNode(job));
  replaceHistory(made);
  start();
  const title = byId("job-title");
  if (focused) {
    title.tabIndex = -1;
    title.focus();
  }
  return true;
}

function replaceHistory(made) {
  const list = made.getElementById("history");
  if (list) byId("history").replaceWith(document.adoptNode(list));
}

// other tabs may have begun something
async function refreshHistory() {
  if (document.hidden) return;
  try {
    const text = await (await fetch(location.href, { credentials: "same-origin" })).text();
    replaceHistory(new DOMParser().parseFromString(text, "text/html"));
  } catch {
    // it stays as it is
  }
}

/* ---- a result ---- */

function compare(stage) {
  const sparse = stage.querySelector(".sparse");
  const dense = stage.querySelector(".dense");
  const split = byId("split");
  const play = byId("play");

  const place = () => {
    stage.style.setProperty("--split", `${split.value}%`);
    split.setAttribute("aria-valuetext", `${split.value} % dense, ${100 - split.value} % sparse`);
  };
  split.addEventListener("input", place);
  place();
  if (play === null) return; // pictures

  const follow = () => {
    if (Math.abs(dense.currentTime - sparse.currentTime) > SYNCED) {
      dense.currentTime = sparse.currentTime;
    }
  };
  sparse.addEventListener("timeupdate", follow);
  sparse.addEventListener("seeked", follow);
  sparse.addEventListener("play", () => {
    play.textContent = "Pause";
    dense.play().catch(() => {});
  });
  sparse.addEventListener("pause", () => {
    play.textContent = "Play";
    dense.pause();
    dense.currentTime = sparse.currentTime;
  });
  play.addEventListener("click", () => (sparse.paused ? begin() : sparse.pause()));
  const begin = () => sparse.play().catch(() => {});
  if (!calm.matches) begin();
}

function result(section) {
  const stage = section.querySelector(".stage");
  if (stage) {
    const { width, height } = stage.dataset;
    stage.style.maxWidth = `calc(58vh * ${width / height})`;
    if (stage.querySelector(".dense")) compare(stage);
  }
  const atlas = byId("atlas");
  if (atlas) atlas.addEventListener("toggle", () => atlas.open && drawAtlas(atlas));
  const copy = byId("copy");
  if (copy) copy.addEventListener("click", copyLink);
}

async function drawAtlas(atlas) {
  if (atlas.dataset.drawn) return;
  atlas.dataset.drawn = "yes";
  const place = byId("atlas-heads");
  place.setAttribute("aria-busy", "true");
  try {
    const answer = await fetch(atlas.dataset.address, { credentials: "same-origin" });
    const made = new DOMParser().parseFromString(await answer.text(), "text/html");
    const heads = made.getElementById("heads");
    if (heads) place.replaceChildren(document.adoptNode(heads));
  } catch {
    delete atlas.dataset.drawn; // the link is still there
  }
  place.removeAttribute("aria-busy");
}

async function copyLink() {
  const link = byId("link");
  link.select();
  try {
    await navigator.clipboard.writeText(link.value);
    byId("copied").textContent = "Copied";
  } catch {
    byId("copied").textContent = "Selected: copy it with your keyboard";
  }
}

/* ---- the form ---- */

function form(element) {
  const plan = byId("plan");
  const stop = byId("stop");
  let chosen = null;
  let attempt = null; // one key for a request that may have to be sent again

  function choose(at) {
    const option = plan.selectedOptions[0];
    chosen = option && option.dataset.choice ? JSON.parse(option.dataset.choice) : null;
    byId("dial").hidden = chosen === null;
    byId("compare-line").hidden = chosen === null;
    byId("compare").disabled = chosen === null;
    if (chosen === null) return;
    stop.max = chosen.stops.length - 1;
    stop.value = at === undefined ? chosen.at : at;
    byId("dial-slider").hidden = chosen.stops.length < 2;
    expect();
  }

  function expect() {
    if (chosen === null) return;
    const point = chosen.stops[stop.value];
    const seconds = point.seconds === null ? "not known" : `${point.seconds.toPrecision(3)} s`;
    const psnr = point.psnr_db === null ? "not known" : `${point.psnr_db.toFixed(1)} dB`;
    const speedup = point.speedup === null ? "not known" : `${point.speedup.toFixed(2)}x`;
    byId("expected-seconds").textContent = seconds;
    byId("expected-psnr").textContent = psnr;
    byId("expected-psnr-name").textContent = point.measured ? "PSNR in its search" : "expected PSNR";
    byId("expected-speedup").textContent = speedup;
    byId("expected-density").textContent = `${(100 * point.density).toFixed(1)} %`;
    stop.setAttribute("aria-valuetext", `forecast ${seconds}, PSNR ${psnr}, speed-up ${speedup}`);
    byId("dial-for").textContent = forWhat();
  }

  function forWhat() {
    const made = chosen.settings;
    if (!made.width) return "The plan doesn't say what these are for.";
    const device = chosen.device ? ` on ${chosen.device}` : "";
    const frames = byId("frames") === null ? "" : `, ${made.num_frames} frames`;
    const size = `${made.width} × ${made.height}${frames}, ${made.steps} steps`;
    const same =
      byId("size").value === `${made.width}x${made.height}` &&
      (byId("frames") === null || Number(byId("frames").value) === made.num_frames) &&
      Number(byId("steps").value) === made.steps;
    return same
      ? `For one sparse generation${device}, where the plan was made.`
      : `For ${size}${device}, where the plan was made. What you ask for is another size: there it isn't known.`;
  }

  async function submit(event) {
    event.preventDefault();
    const button = byId("submit");
    const fields = new FormData(element);
    const image = fields.get("input_reference");
    if (image instanceof File && image.size === 0) fields.delete("input_reference");
    if (chosen !== null) {
      const point = chosen.stops[stop.value];
      if (point.ask !== null) fields.set("speedup", point.ask);
    }
    complain("");
    button.disabled = true;
    attempt = attempt || randomKey();
    try {
      const answer = await ask(element.getAttribute("action"), {
        method: "POST",
        body: fields,
        headers: { "Idempotency-Key": attempt },
      });
      if (answer.ok) {
        location.assign(`/jobs/${answer.body.id}`);
        return;
      }
      attempt = null;
      complain(reason(answer), answer.body && answer.body.error && answer.body.error.param);
    } catch {
      complain("The server doesn't answer. Press again: the job is made only once.");
    }
    button.disabled = false;
  }

  function complain(words, name) {
    byId("wrong").textContent = words;
    for (const field of element.elements) field.removeAttribute("aria-invalid");
    const field = name && element.elements[name];
    if (field && field.focus) {
      const folded = field.closest("details");
      if (folded) folded.open = true;
      field.setAttribute("aria-invalid", "true");
      field.focus();
    }
  }

  element.addEventListener("submit", submit);
  element.addEventListener("input", () => {
    attempt = null; // another request
    expect();
  });
  plan.addEventListener("change", () => choose());
  // a browser that goes back shows what it had before
  window.addEventListener("pageshow", (event) => {
    byId("submit").disabled = false;
    if (event.persisted) attempt = null;
  });
  choose(Number(stop.dataset.at));
}

function randomKey() {
  const bytes = crypto.getRandomValues(new Uint8Array(16));
  return [...bytes].map((byte) => byte.toString(16).padStart(2, "0")).join("");
}

/* ---- all of it ---- */

function start() {
  const section = byId("job");
  if (byId("running")) follow(section);
  else result(section);
}

// a notice that no worker is ready says why as that changes, and goes as soon as one is
async function awaitWorkers(notice) {
  for (;;) {
    await sleep(HEALTH);
    try {
      const { body } = await ask("/health");
      if (body.status === "ok") {
        notice.remove();
        return;
      }
      const state = `${body.status} ${body.troubles.length}`;
      if (state === notice.dataset.state) continue;
      const text = await (await fetch(location.href, { credentials: "same-origin" })).text();
      const made = new DOMParser().parseFromString(text, "text/html").getElementById("unready");
      if (made) notice.textContent = made.textContent;
      notice.dataset.state = state;
    } catch {
      // asked again
    }
  }
}

start();
if (byId("unready")) awaitWorkers(byId("unready"));
if (byId("ask")) form(byId("ask"));
document.addEventListener("visibilitychange", refreshHistory);
