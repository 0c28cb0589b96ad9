"""Read the ONNX graph of exports with plain ONNX Runtime or OpenVINO.

The tokenizer is the unchanged tokenizer.json, with padding on the right. A prompt is part of the text.
"""

import functools
import json
from pathlib import Path
from typing import Any

import numpy as np
from row_files import Row, join_texts, run
from tokenizers import Tokenizer

BATCH_SIZE = 4


def load_graph(path: Path, runtime: str) -> Any:
    """Return a function from input_ids and attention_mask [B, T] to a dict of outputs."""
    if runtime == "openvino":
        import openvino

        compiled = openvino.compile_model(openvino.convert_model(path), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
        names = [next(iter(output.names)) for output in compiled.outputs]
        return lambda inputs: dict(zip(names, compiled(inputs).values(), strict=True))
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return lambda inputs: dict(zip(names, session.run(None, inputs), strict=True))


def encode(folder: str, rows: list[Row], runtime: str) -> list[np.ndarray]:
    """Return vectors of every row."""
    path = Path(folder) / "onnx" / "model.onnx"
    if not path.is_file():
        raise FileNotFoundError("no onnx/model.onnx")
    tokenizer = Tokenizer.from_file(str(Path(folder) / "tokenizer.json"))
    length = json.loads((Path(folder) / "sentence_bert_config.json").read_text())["max_seq_length"]
    tokenizer.enable_truncation(length)
    tokenizer.enable_padding()
    graph = load_graph(path, runtime)
    texts, vectors = join_texts(rows), []
    for start in range(0, len(texts), BATCH_SIZE):
        batch = tokenizer.encode_batch(texts[start : start + BATCH_SIZE])
        inputs = {
            "input_ids": np.array([encoding.ids for encoding in batch], np.int64),
            "attention_mask": np.array([encoding.attention_mask for encoding in batch], np.int64),
        }
        vectors += list(graph(inputs)["sentence_embedding"])
    return vectors


RUNTIMES = "onnxruntime", "openvino"
run({name: functools.partial(encode, runtime=name) for name in RUNTIMES}, *RUNTIMES)
