// The page of a server that writes: asks for a stream, and draws the canvas of each step. Needs no library.
"use strict";

const byId = (id) => document.getElementById(id);
let watching = null; // what ends the stream, and with it the job

function asked() {
  const body = {
    prompt: byId("prompt").value,
    max_tokens: Number(byId("length").value),
    temperature: Number(byId("temperature").value || 0),
    plan: byId("plan").value,
    stream: true,
    stream_options: { include_usage: true, include_canvas: true },
  };
  if (byId("seed").value !== "") body.seed = Number(byId("seed").value);
  return body;
}

function draw(tokens) {
  const parts = tokens.map((token) => {
    const part = document.createElement("span");
    part.textContent = token === null ? " ▒" : token;
    if (token === null) part.className = "wait";
    return part;
  });
  byId("canvas").replaceChildren(...parts);
}

async function* chunks(answer) {
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) throw new Error("The server's answer is cut off.");
    const events = (rest + value).split("\n\n");
    rest = events.pop();
    for (const event of events) {
      if (!event.startsWith("data: ")) continue;
      if (event === "data: [DONE]") return;
      yield JSON.parse(event.slice(6));
    }
  }
}

async function write() {
  watching = new AbortController();
  byId("state").textContent = "Waiting";
  const answer = await fetch("/v1/completions", {
    method: "POST",
    credentials: "same-origin",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify(asked()),
    signal: watching.signal,
  });
  if (answer.status === 401) return location.reload(); // which asks for the key
  if (!answer.ok) throw new Error((await answer.json()).error.message);
  let text = "", id = null;
  for await (const chunk of chunks(answer)) {
    if (chunk.error) throw new Error(chunk.error.message);
    id = chunk.id;
    text += chunk.choices.map((choice) => choice.text).join("");
    if (chunk.canvas) {
      byId("state").textContent = `Step ${chunk.canvas.step}`;
      draw(chunk.canvas.tokens);
    }
  }
  byId("canvas").textContent = text;
  await result(id);
}

async function result(id) {
  const found = await (await fetch(`/v1/completions/${id}`, { credentials: "same-origin" })).json();
  byId("state").textContent = found.choices[0].finish_reason === "stop" ? "The text is at its end" : "As many tokens as were asked for";
  byId("seconds").textContent = found.inference_time_s.toFixed(2);
  byId("density").textContent = found.density === null ? "dense" : `${(100 * found.density).toFixed(0)} %`;
  byId("steps").textContent = found.steps;
  byId("tokens").textContent = `${found.usage.prompt_tokens} + ${found.usage.completion_tokens}`;
  byId("facts").hidden = false;
}

byId("stop").addEventListener("click", () => watching.abort());
byId("ask").addEventListener("submit", async (event) => {
  event.preventDefault();
  byId("submit").disabled = true;
  byId("stop").hidden = false;
  byId("facts").hidden = true;
  byId("wrong").textContent = "";
  byId("canvas").replaceChildren();
  try {
    await write();
  } catch (error) {
    byId("state").textContent = error.name === "AbortError" ? "Stopped" : "";
    if (error.name !== "AbortError") byId("wrong").textContent = error.message;
  }
  byId("submit").disabled = false;
  byId("stop").hidden = true;
});
