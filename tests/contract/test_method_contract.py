"""What every shipped method holds, and the example of one's own in the README."""

from pathlib import Path
from typing import ClassVar

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from neighbour_tables import clustered, tsds_tables, unit

from dataflex_pipeline.api import FeatureInput, Silent
from dataflex_pipeline.config.fields import Config
from dataflex_pipeline.features.plan import make_feature
from dataflex_pipeline.methods import method_class, shipped_methods
from dataflex_pipeline.testing.method import MethodContract
from dataflex_pipeline.testing.tables import MemoryTable, random_numbers

EXAMPLE = Path(__file__).resolve().parents[1] / "examples" / "shortest.py"
SMALL: dict = {"proj_dim": 16, "dtype": "float32"}
METRIC: dict = {**SMALL, "reward_model_backend": "metric"}


class TestRandom(MethodContract):
    method = method_class("random")


class TestLoss(MethodContract):
    method = method_class("loss")
    params: ClassVar = {"focus": "medium", "temperature": 0.5}


class TestPerplexity(MethodContract):
    method = method_class("perplexity")
    params: ClassVar = {"focus": "middle", "loss": "total"}


class TestPerplexityLow(MethodContract):
    method = method_class("perplexity")
    params: ClassVar = {"focus": "low"}


class TestPerplexityOfAnotherModel(MethodContract):
    method = method_class("perplexity")
    params: ClassVar = {"score_model": "someone/small"}


class TestIfd(MethodContract):
    method = method_class("ifd")


class TestIfdOfAnotherModel(MethodContract):
    method = method_class("ifd")
    params: ClassVar = {"score_model": "someone/small", "score_template": "chatml"}


class TestColumn(MethodContract):
    method = method_class("column")
    params: ClassVar = {"column": "quality", "descending": False}

    def rows(self, split):
        rows = super().rows(split)
        return rows.append_column("original_quality", pa.array(random_numbers("quality").random(len(rows))))


class TestColumnOfAFile(MethodContract):
    method = method_class("column")

    @pytest.fixture(autouse=True, params=["row", "row_id", "line"])
    def _written(self, request, tmp_path):
        """A score for every row, in another order where lines are joined by a key."""
        rows, rng = self.rows("pool").select(["row", "row_id"]), random_numbers("file")
        rows = rows.append_column("score", pa.array(rng.random(len(rows))))
        if request.param != "line":
            rows = rows.take(rng.permutation(len(rows)))
        pq.write_table(rows, tmp_path / "scores.parquet")
        self.params = {"file": tmp_path / "scores.parquet", "by": request.param}


class TestDeltaLoss(MethodContract):
    method = method_class("delta_loss")
    params: ClassVar = {"schedule": "centered"}


class TestLess(MethodContract):
    method = method_class("less")


class TestLessProjected(MethodContract):
    method = method_class("less")
    params = SMALL


class TestLessOfOneRound(MethodContract):
    method = method_class("less")
    params: ClassVar = {**SMALL, "accumulate": False, "gradient_type": "sgd"}


class TestNice(MethodContract):
    method = method_class("nice")
    params: ClassVar = {"reward_model_backend": "metric"}


class TestNiceProjected(MethodContract):
    method = method_class("nice")
    params = METRIC


class TestNiceOverRounds(MethodContract):
    method = method_class("nice")
    params: ClassVar = {**METRIC, "accumulate": True, "policy": "rejection"}


class TestNear(MethodContract):
    method = method_class("near")


class TestNearByTheModelItself(MethodContract):
    method = method_class("near")
    params: ClassVar = {"embed_method": "model"}


class TestRds(MethodContract):
    method = method_class("rds")


class TestBm25(MethodContract):
    method = method_class("bm25")

    def tables(self, needs):
        """Terms are no random numbers: they are those of the made-up rows."""
        found = {}
        for key, need in needs.items():
            feature, rows = make_feature(need, Config()), self.rows(need.split)
            with feature.open(FeatureInput(MemoryTable(rows), "", None, None), Silent()) as compute:
                found[key] = MemoryTable(compute(rows))
        return found


class TestBm25OfAll(TestBm25):
    params: ClassVar = {"aggregate": "mean", "query_text": "prompt"}


class TestJudge(MethodContract):
    method = method_class("judge")
    params: ClassVar = {"reward_model_backend": "metric"}


class TestTsds(MethodContract):
    method = method_class("tsds")
    params: ClassVar = {"max_K": 12, "kde_K": 8}

    @pytest.fixture(autouse=True)
    def _made(self, tmp_path):
        """Neighbours and densities are no random numbers: they are computed from random vectors."""
        rng = random_numbers("tsds")
        centres = unit(rng.standard_normal((4, 8)))
        pool, target = clustered(rng, self.pool_rows, centres), clustered(rng, self.target_rows, centres)
        crowd = {"kde_K": 8, "gaussian": True}
        valid = self.rows("pool")["valid"].to_numpy()
        self.found = tsds_tables(tmp_path, pool, target, pool_valid=valid, near={"max_K": 12}, crowd=crowd)

    def tables(self, needs):
        return {key: self.found[key] for key in needs}


class TestTsdsByScore(TestTsds):
    params: ClassVar = {"max_K": 12, "kde_K": 8, "assignment": "score", "sample_size": 10}


class TestShortest(MethodContract):
    method = method_class("shortest", EXAMPLE)


def test_no_shipped_method_is_forgotten():
    tested = {
        kind.method.__module__.rpartition(".")[2]
        for kind in globals().values()
        if isinstance(kind, type) and issubclass(kind, MethodContract) and kind is not MethodContract
    }
    assert tested >= set(shipped_methods())
