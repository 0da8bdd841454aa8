"""The executor of ONNX graphs on a device, over a stand-in runtime: all but CUDA's kernels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import halfbyte

pytest.importorskip("onnx")

from halfbyte.ir.errors import ModelError, TargetError  # noqa: E402
from halfbyte.runtime.artifact import Artifact  # noqa: E402
from halfbyte.runtime.net import Net  # noqa: E402
from tests.net_stand_in import HostOnly, compile_stand_in, toolchain  # noqa: E402
from tests.onnx.node_cases import PASSED, cases, run_artifact  # noqa: E402
from tests.onnx_networks import bert, bert_weights  # noqa: E402

CASES = (
    "test_add_bcast", "test_if", "test_loop11", "test_scan9_sum", "test_slice_negative_axes",
    "test_reshape_reordered_all_dims", "test_range_int32_type_negative_delta", "test_where_example",
)  # fmt: skip


@pytest.fixture(scope="module")
def cache(pytestconfig: pytest.Config) -> Path:
    assert pytestconfig.cache is not None
    return Path(pytestconfig.cache.mkdir("objects"))


@pytest.fixture(scope="module")
def compiler(cache: Path) -> HostOnly:
    try:
        return toolchain(cache)
    except TargetError as error:
        pytest.skip(f"the executor needs CUDA's headers: {error}")


@pytest.mark.parametrize("name", CASES)
def test_a_node_case(name: str, tmp_path: Path, cache: Path, compiler: HostOnly) -> None:
    file = tmp_path / "case.onnx"
    file.write_bytes(cases()[name].model.SerializeToString())
    compile_stand_in(file, tmp_path / "case.hb", cache, compiler)
    outcome = run_artifact(name, tmp_path / "case.hb", "cuda:0")
    assert outcome.kind == PASSED, outcome


def feed_of(rows: int, length: int) -> dict[str, Any]:
    ids = np.random.default_rng(length).integers(0, 50, (rows, length))
    return {"input_ids": ids, "attention_mask": np.ones_like(ids)}


def test_a_network_waits_for_its_result_alone(
    tmp_path: Path, cache: Path, compiler: HostOnly
) -> None:
    file = tmp_path / "bert.onnx"
    file.write_bytes(bert(bert_weights(), layers=2, heads=4).SerializeToString())
    compile_stand_in(file, tmp_path / "bert.hb", cache, compiler)
    image = Artifact.open(tmp_path / "bert.hb").target("sm_90a").image
    assert len(image) > 1 and len({run.file for run in image}) == 2  # shared with the cpu's
    with (
        halfbyte.load(tmp_path / "bert.hb", "cuda:0") as net,
        halfbyte.load(tmp_path / "bert.hb") as known,
    ):
        assert isinstance(net, Net) and isinstance(known, Net)
        assert (net.target, net.isa) == ("sm_90a", "sm_90a")
        for feed in (feed_of(2, 7), feed_of(1, 12), feed_of(2, 7)):
            np.testing.assert_allclose(
                net.run(feed)["output"], known.run(feed)["output"], atol=1e-4
            )
        before = net.counters()
        net.run(feed_of(2, 7))
        after = net.counters()
        spent = {name: after[name] - before[name] for name in after}
        assert (spent["system_allocations"], spent["device_allocations"]) == (0, 0)
        assert (spent["uploads"], spent["downloads"]) == (2, 1)  # the inputs; the result
        with pytest.raises(ModelError, match="Gather"):
            net.run({**feed_of(2, 7), "input_ids": feed_of(2, 7)["input_ids"] + 1000})
        net.run(feed_of(2, 7))
