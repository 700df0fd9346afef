"""Where a VLM's images and videos lie in its tokens: by a hook on the model and one on its vision tower.

The ids of a prompt say where placeholders are, the tower's arguments or the config how many rows and columns
stand behind them. It is kept with the request, by its cache, so that chunks of a prefill know the whole.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache

from ...modalities import Modalities
from .grids import FAMILIES, Grid, Unfit, media_of

NO_IDS = "the prompt came as inputs_embeds, which don't tell where images lie"
BEFORE = "the tokens before this call were cached by a call that wasn't seen"
CROPPED = "images of the prompt were cropped from its cache"
COMPILED = "a compiled forward doesn't tell where images lie"
IMAGE, VIDEO = 1, 2  # as in mm_token_type_ids


class Request:
    """What is known of the prompts that one cache holds.

    Args:
        kinds: uint8 `[B, L]`: 0 text, 1 image, 2 video, of the tokens so far.
        grids: What the vision tower was called for, in order.
        unknown: Why the tokens so far aren't known, or None.
    """

    def __init__(self, kinds: Tensor, unknown: str | None) -> None:
        self.kinds = kinds
        self.grids: list[Grid] = []
        self.unknown = unknown
        self.found: tuple[Modalities, ...] | None = None

    def modalities(self, config: Any) -> tuple[Modalities, ...]:
        """The modalities of each item, found once for the tokens so far."""
        if self.found is None:
            length = self.kinds.shape[1]
            try:
                if self.unknown is not None:
                    raise Unfit(self.unknown)
                media = media_of(config, self.kinds, self.grids)
                self.found = tuple(Modalities(length, item) for item in media)
            except Unfit as why:
                self.found = (Modalities(length, unknown=str(why)),) * len(self.kinds)
        return self.found


class Media:
    """What the hooks of one VLM saw, and what follows for the present forward.

    Args:
        config: The model's config.
    """

    def __init__(self, config: Any) -> None:
        self.config = config
        self._requests: weakref.WeakKeyDictionary[Cache, Request] = weakref.WeakKeyDictionary()
        self._grids: list[Grid] = []  # of tower calls that no request has taken yet
        self._now: Request | str = BEFORE

    def __reduce__(self):
        return Media, (self.config,)

    @staticmethod
    def of(model: nn.Module) -> Media | None:
        """For a model whose config names placeholders of images; None for others."""
        config: Any = model.config
        return None if _placeholder(config) is None else Media(config)

    def watch(self, model: Any) -> list[Any]:
        """Set the hooks, and return their handles."""
        handles = [
            model.register_forward_pre_hook(self._before, with_kwargs=True),
            model.register_forward_hook(self._after),
        ]
        tower = model.get_encoder(modality="image")
        if isinstance(tower, nn.Module) and tower is not model:
            handles.append(tower.register_forward_pre_hook(self._before_tower, with_kwargs=True))
        return handles

    def modalities(self, num_keys: int, batch: int) -> tuple[Modalities, ...]:
        """Those of each item of the present forward; empty if its keys aren't its first `num_keys` tokens."""
        now, grids, self._grids = self._now, self._grids, []
        if isinstance(now, Request):
            if grids:
                now.grids, now.found = [*now.grids, *grids], None
            found = now.modalities(self.config)
            if num_keys < now.kinds.shape[1]:
                return ()
            if len(found) == batch:
                return tuple(item.until(num_keys) for item in found)
            now = f"the prompts were {len(found)}, and this call has {batch}"
        return (Modalities(num_keys, unknown=now),) * batch

    def _before(self, model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        if torch.compiler.is_compiling():
            return
        ids = kwargs.get("input_ids", args[0] if args else None)
        cache = kwargs.get("past_key_values")
        known = self._requests.get(cache) if isinstance(cache, Cache) else None
        if not isinstance(ids, Tensor) or ids.ndim != 2:
            self._now, self._grids = NO_IDS, []
        elif ids.shape[1] == 1 and known is not None:  # what is generated is text
            self._now = known
        else:
            self._now = self._read(ids, kwargs.get("mm_token_type_ids"), cache, known)
            if isinstance(cache, Cache):
                self._requests[cache] = self._now

    def _after(self, model: nn.Module, args: tuple, output: Any) -> None:
        cache = getattr(output, "past_key_values", None)
        now = None if torch.compiler.is_compiling() else self._now
        if isinstance(now, Request) and isinstance(cache, Cache):
            self._requests.setdefault(cache, now)

    def _read(self, ids: Tensor, types: Any, cache: Any, known: Request | None) -> Request:
        """The request with its tokens up to this forward's; waits once for the device of the ids."""
        past = int(cache.get_seq_length()) if isinstance(cache, Cache) else 0
        kinds = self._kinds(ids, types)
        off = self._off(kinds)
        if past == 0:
            return Request(kinds, off)
        if known is None or len(known.kinds) != len(kinds):
            before = kinds.new_zeros(len(kinds), past)
            return Request(torch.cat([before, kinds], 1), BEFORE)
        before = known.kinds[:, :past]
        before = torch.nn.functional.pad(before, (0, past - before.shape[1]))  # generated ones
        cropped = CROPPED if known.kinds[:, past:].any() else None
        joined = Request(torch.cat([before, kinds], 1), known.unknown or off or cropped)
        joined.grids = known.grids
        return joined

    def _off(self, kinds: Tensor) -> str | None:
        if self.config.model_type in FAMILIES or not kinds.any():
            return None
        return f"where images of {self.config.model_type} lie isn't known to sparse_dit"

    def _kinds(self, ids: Tensor, types: Any) -> Tensor:
        """uint8 `[B, N]` on the CPU."""
        video = getattr(self.config, "video_token_id", None)
        image = ids == _placeholder(self.config)
        moving = torch.zeros_like(image) if video is None else ids == video
        if isinstance(types, Tensor) and types.shape == ids.shape:  # frames that bear an image's id
            moving = moving | (image & (types == VIDEO))
        return (image * IMAGE).masked_fill(moving, VIDEO).to("cpu", torch.uint8)

    def _before_tower(self, tower: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        family = FAMILIES.get(self.config.model_type)
        if family is not None and family.told is not None and not torch.compiler.is_compiling():
            given = {"pixel_values": args[0], **kwargs} if args else kwargs
            self._grids += family.told(self.config, given)


def _placeholder(config: Any) -> int | None:
    """The id that stands for an image's tokens, by whichever name it has."""
    found = (getattr(config, name, None) for name in ("image_token_id", "image_token_index"))
    return next((token for token in found if isinstance(token, int)), None)
