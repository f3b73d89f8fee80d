from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from torch import nn

from compression.data import Data
from compression.errors import CompressionError, ExportError
from compression.export import export, open_session, run, tensor_specs
from compression.training import predict_logits
from compression.variant import Variant


def test_the_graph_answers_like_torch_for_any_batch(
    network: nn.Module, data: Data, recwarn: pytest.WarningsRecorder, capfd: pytest.CaptureFixture[str]
) -> None:
    exported = export(network, data.rows("validation").take(slice(0, 16)).tensors)
    session = open_session(exported.onnx.SerializeToString())
    tensors = data.rows("test").tensors
    for batch in (1, 7, 600):
        np.testing.assert_allclose(run(session, tensors, batch), predict_logits(network, tensors), atol=1e-4)
    assert 0 <= exported.max_error < 1e-4
    assert not recwarn.list
    assert capfd.readouterr() == ("", "")


def test_inputs_keep_their_names_and_a_dynamic_batch(network: nn.Module, data: Data) -> None:
    exported = export(network, data.rows("validation").take(slice(0, 16)).tensors)
    inputs, outputs = tensor_specs(exported.onnx)
    assert [(spec.name, spec.dtype, spec.shape) for spec in (*inputs, *outputs)] == [
        ("numbers", "float32", ("batch", 2)),
        ("side", "int64", ("batch", 1)),
        ("logits", "float32", ("batch", 2)),
    ]


def test_the_program_loads_without_the_networks_class(network: nn.Module, data: Data) -> None:
    rows = data.rows("validation").take(slice(0, 16)).tensors
    program = torch.export.load(io.BytesIO(export(network, rows).program))
    output = program.module()(**{name: torch.from_numpy(array) for name, array in rows.items()})
    np.testing.assert_allclose(output.detach().numpy(), predict_logits(network, rows), atol=1e-6)


def test_a_network_that_gives_no_numbers_is_refused(data: Data) -> None:
    class Broken(nn.Module):
        def forward(self, numbers: torch.Tensor, side: torch.Tensor) -> torch.Tensor:
            return torch.log(numbers - 100) * side

    with pytest.raises(ExportError, match="differ by nan"):
        export(Broken(), data.rows("validation").take(slice(0, 16)).tensors)


def test_a_network_that_cannot_be_traced_is_refused_in_one_line(data: Data) -> None:
    class Branching(nn.Module):
        def forward(self, numbers: torch.Tensor, side: torch.Tensor) -> torch.Tensor:
            return numbers if numbers.sum() > 0 else numbers * side

    with pytest.raises(ExportError, match="torch cannot export") as caught:
        export(Branching(), data.rows("validation").take(slice(0, 16)).tensors)
    assert "\n" not in str(caught.value)


def test_too_few_rows_to_compare_are_refused(network: nn.Module, data: Data) -> None:
    with pytest.raises(ExportError, match="needs at least 8 rows; the split has 7"):
        export(network, data.rows("validation").take(slice(0, 7)).tensors)


def test_bytes_that_are_no_model_are_refused() -> None:
    with pytest.raises(CompressionError, match="cannot load the model"):
        open_session(b"nothing of the kind")


class Summed(nn.Module):
    """As long as what it reads, if it says so."""

    def __init__(self, axes: dict[str, dict[int, str]]) -> None:
        super().__init__()
        self.dynamic_axes = axes
        self.words = nn.Embedding(9, 2)

    def forward(self, ids: torch.Tensor, shown: torch.Tensor) -> torch.Tensor:
        return (self.words(ids) * shown[:, :, None]).sum(1)


TEXTS = {"ids": np.arange(96).reshape(8, 12) % 9, "shown": np.ones((8, 12), np.float32)}


def test_axes_that_the_network_names_are_free_in_the_graph() -> None:
    model = Summed({"ids": {1: "tokens"}, "shown": {1: "tokens"}})
    exported = export(model, TEXTS)
    assert [spec.shape for spec in tensor_specs(exported.onnx)[0]] == [("batch", "tokens")] * 2
    session = open_session(exported.onnx.SerializeToString())
    for length in (1, 5, 12):
        rows = {name: array[:, :length] for name, array in TEXTS.items()}
        np.testing.assert_allclose(run(session, rows, 3), predict_logits(model, rows), atol=1e-6)


def test_a_network_that_looks_at_the_size_of_a_free_axis_is_refused() -> None:
    class Fixed(Summed):
        def forward(self, ids: torch.Tensor, shown: torch.Tensor) -> torch.Tensor:
            return super().forward(ids, shown).reshape(-1, 2) + torch.ones(12)[: ids.shape[1]].view(12).sum()

    with pytest.raises(ExportError, match="torch cannot export"):
        export(Fixed({"ids": {1: "tokens"}, "shown": {1: "tokens"}}), TEXTS)


@pytest.mark.parametrize("axes", [{"words": {1: "tokens"}}, {"ids": {2: "tokens"}}, {"ids": {0: "rows"}}])
def test_free_axes_that_there_are_not_are_refused(axes: dict[str, dict[int, str]]) -> None:
    with pytest.raises(ExportError, match="the inputs are ids with 2 axes, shown with 2 axes"):
        export(Summed(axes), TEXTS)


def test_an_exported_model_has_no_notes_of_the_exporter_and_no_paths(full: Variant) -> None:
    content = full.onnx_bytes()
    assert b"pkg.torch" not in content
    assert b".py" not in content
