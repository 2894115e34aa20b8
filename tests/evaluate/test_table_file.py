from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from moqe.data.protocols import Scored, SplitSamples, protocol_digest, reduce
from moqe.errors import CheckpointError, NumericalError, ProtocolError
from moqe.evaluate.table_file import LossTableFile, read_losses

PROTOCOLS = ("whole", "prefix-4")
METRIC = "nats_per_token"
UNITS = 9


def split(n: int, digest: str = "samples") -> SplitSamples:
    return SplitSamples(
        tuple(f"document-{i // 2}" for i in range(n)),
        tuple("code" if i % 4 < 2 else "prose" for i in range(n)),
        digest,
        {protocol: np.arange(n) + 10 for protocol in PROTOCOLS},
        {protocol: protocol_digest(protocol, UNITS) for protocol in PROTOCOLS},
    )


def nats(expert: str, split_name: str, n: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(len(expert) * 100 + len(split_name))
    return torch.rand(n, UNITS, generator=generator)


def scored(nats: torch.Tensor, protocols: tuple[str, ...] = PROTOCOLS) -> Scored:
    return Scored({protocol: {METRIC: reduce(nats, protocol)} for protocol in protocols})


def table_file(folder: Path, runtime: str = "reference", chunk: int = 3, digest: str = "samples") -> LossTableFile:
    return LossTableFile(
        folder / "parts",
        ("base", "rtn", "gptq"),
        {"test": split(7, digest), "router_validation": split(4)},
        (METRIC,),
        runtime,
        chunk,
    )


def score(file: LossTableFile, stop_after: int = 10**6) -> int:
    written = 0
    for expert in file.experts:
        for name, samples in file.splits.items():
            for chunk in file.pending(expert, name):
                if written == stop_after:
                    return written
                losses = nats(expert, name, len(samples))[list(chunk.rows)]
                file.add(chunk, scored(losses))
                written += 1
    return written


def test_what_is_written_is_what_is_read(tmp_path: Path) -> None:
    file = table_file(tmp_path)
    score(file)
    file.merge(tmp_path / "losses.parquet")
    table = read_losses(tmp_path / "losses.parquet", "test", "prefix-4", METRIC)
    assert table.experts == ("rtn", "gptq")
    assert (table.protocol, table.runtime, len(table)) == ("prefix-4", "reference", 7)
    expected = nats("gptq", "test", 7).double()[:, 3:]
    assert np.allclose(table.loss[:, 1], expected.sum(1), rtol=1e-12)
    assert np.allclose(table.halves[:, 1, 0], expected[:, :3].sum(1), rtol=1e-12)
    assert np.allclose(table.halves.sum(-1), table.loss, rtol=1e-12)
    assert np.allclose(table.base, nats("base", "test", 7).double()[:, 3:].sum(1), rtol=1e-12)
    assert table.count.tolist() == [6.0] * 7
    assert table.count_halves.tolist() == [[3.0, 3.0]] * 7
    assert table.text_bytes.tolist() == list(range(10, 17))
    assert table.document.tolist() == [f"document-{i // 2}" for i in range(7)]
    assert table.domain[2] == "prose"
    assert np.allclose(table.chosen(np.array([0, 1, 0, 0, 0, 0, 0]))[1], expected.sum(1)[1])
    assert table.select(table.domain == "prose").sample.tolist() == [2, 3, 6]


def test_scoring_resumes_and_ends_in_the_same_bytes(tmp_path: Path) -> None:
    whole, resumed = table_file(tmp_path / "a"), table_file(tmp_path / "b")
    total = score(whole)
    assert score(resumed, stop_after=5) == 5
    assert score(table_file(tmp_path / "b")) == total - 5
    whole.merge(tmp_path / "a.parquet")
    resumed.merge(tmp_path / "b.parquet")
    assert (tmp_path / "a.parquet").read_bytes() == (tmp_path / "b.parquet").read_bytes()


def test_rows_are_ordered_by_split_protocol_expert_and_sample(tmp_path: Path) -> None:
    file = table_file(tmp_path)
    score(file)
    file.merge(tmp_path / "losses.parquet")
    rows = pq.read_table(tmp_path / "losses.parquet")
    keys = zip(*(rows[name].to_pylist() for name in ("split", "protocol", "expert", "sample")), strict=True)
    order = {"split": list(file.splits), "protocol": list(PROTOCOLS), "expert": list(file.experts)}
    ranks = [(order["split"].index(a), order["protocol"].index(b), order["expert"].index(c), d) for a, b, c, d in keys]
    assert ranks == sorted(ranks)
    assert len(ranks) == (7 + 4) * 2 * 3


def test_a_missing_chunk_stops_the_merge(tmp_path: Path) -> None:
    file = table_file(tmp_path)
    score(file, stop_after=4)
    with pytest.raises(CheckpointError, match="not scored"):
        file.merge(tmp_path / "losses.parquet")
    assert not (tmp_path / "losses.parquet").exists()


@pytest.mark.parametrize("change", [{"runtime": "packed"}, {"digest": "other"}, {"chunk": 2}])
def test_parts_measured_otherwise_are_not_mixed_in(tmp_path: Path, change: dict[str, object]) -> None:
    score(table_file(tmp_path), stop_after=2)
    with pytest.raises(ProtocolError, match="score again"):
        score(table_file(tmp_path, **change))  # type: ignore[arg-type]


def test_a_table_that_mixes_runtimes_is_refused(tmp_path: Path) -> None:
    file = table_file(tmp_path)
    score(file)
    path = tmp_path / "losses.parquet"
    file.merge(path)
    rows = pq.read_table(path)
    runtimes = ["packed" if name == "gptq" else "reference" for name in rows["expert"].to_pylist()]
    index = rows.schema.get_field_index("runtime")
    pq.write_table(rows.set_column(index, rows.schema.field(index), [runtimes]), path)
    with pytest.raises(ProtocolError, match="packed and reference"):
        read_losses(path, "test", "whole", METRIC)


def test_a_loss_that_is_not_finite_is_never_written(tmp_path: Path) -> None:
    file = table_file(tmp_path)
    chunk = next(file.pending("rtn", "test"))
    found = scored(torch.ones(3, UNITS))
    found.losses["whole"][METRIC].loss_sum[1] = np.nan
    with pytest.raises(NumericalError, match="rtn"):
        file.add(chunk, found)
    assert list(tmp_path.rglob("*.parquet")) == []


def test_losses_must_fit_the_chunk(tmp_path: Path) -> None:
    file = table_file(tmp_path)
    chunk = next(file.pending("rtn", "test"))
    with pytest.raises(ProtocolError, match="protocols"):
        file.add(chunk, scored(torch.ones(3, UNITS), ("whole",)))
    with pytest.raises(ProtocolError, match="2 losses for 3 samples"):
        file.add(chunk, scored(torch.ones(2, UNITS)))


def test_unknown_splits_and_protocols_get_a_suggestion(tmp_path: Path) -> None:
    file = table_file(tmp_path)
    score(file)
    path = tmp_path / "losses.parquet"
    file.merge(path)
    with pytest.raises(ProtocolError, match="did you mean 'prefix-4'"):
        read_losses(path, "test", "prefix-5", METRIC)
    with pytest.raises(ProtocolError, match="did you mean 'router_validation'"):
        read_losses(path, "validation", "whole", METRIC)


def test_missing_and_damaged_files_say_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="does not exist"):
        read_losses(tmp_path / "losses.parquet", "test", "whole", METRIC)
    file = table_file(tmp_path)
    score(file)
    path = tmp_path / "losses.parquet"
    file.merge(path)
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(CheckpointError, match="delete it"):
        read_losses(path, "test", "whole", METRIC)
