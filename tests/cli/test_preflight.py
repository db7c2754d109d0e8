"""What a run would stop at later is found before its warm-up: models, packages, quotas, endpoints."""

from __future__ import annotations

import errno
import json
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from cli_runs import SMALL, STEPS, copied, data, dataflex, done, refused, small, snapshot
from misbehaving_server import reply
from reward_models import make_reward_model
from test_doctor import findings

from dataflex_pipeline import Run
from dataflex_pipeline.config.checks import TRACKERS
from dataflex_pipeline.errors import ConfigError, UserError
from dataflex_pipeline.process.exits import exit_code
from dataflex_pipeline.reward.endpoint import try_endpoint
from dataflex_pipeline.reward.rewarders import read_settings
from dataflex_pipeline.reward.settings import ApiSettings

NICE = ("component_name=nice", "nice.generator=transformers", "nice.mc_samples=2", "nice.proj_dim=32")
SHORT = ("nice.max_new_tokens=4", "nice.dtype=float32", "update_times=1", "max_samples=12")
PLACE = "nice.reward_backend_params"


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty folder to work in."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def closed():
    """The address of a port of this machine where nothing listens."""
    with socket.socket() as held:  # bound and not listening: nobody else takes it, connections are refused
        held.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{held.getsockname()[1]}/v1/chat/completions"


class Server:
    """A judge that gives every answer half a point; GET is answered as told.

    Attributes:
        url: of its chat endpoint. asked: paths of all requests, with their method.
    """

    def __init__(self, get: int | None) -> None:
        self.asked: list[tuple[str, str, str | None]] = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                outer.asked.append(("GET", self.path, self.headers["Authorization"]))
                if get is None:
                    self.connection.close()
                else:
                    self.send_response(get)
                    self.end_headers()

            def do_POST(self):
                outer.asked.append(("POST", self.path, None))
                self.rfile.read(int(self.headers["Content-Length"]))
                self.send_response(200)
                self.send_header("Content-Type", "application/json")
                self.end_headers()
                self.wfile.write(reply("Score: 0.5").body)

            def log_message(self, *args):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1/chat/completions"

    def __enter__(self):
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *error):
        self.server.shutdown()
        self.server.server_close()


def api(url, key="null"):
    backend = "nice.reward_model_backend=api"
    return (backend, f"{PLACE}.api.api_url={url}", f"{PLACE}.api.api_key={key}", f"{PLACE}.api.max_retries=0")


# Endpoints


@pytest.mark.parametrize(
    ("get", "said"), [(200, ""), (404, ""), (501, ""), (302, ""), (401, "401"), (403, "403"), (None, "list")]
)
def test_any_answer_shows_that_an_endpoint_is_there(get, said):
    with Server(get) as server:
        found = try_endpoint(ApiSettings(api_url=server.url), "a-key")
    assert server.asked == [("GET", "/v1/models", "Bearer a-key")]  # nothing that is paid for
    assert [said in line for line in found] == ([True] if said else [])
    assert "a-key" not in "".join(found)


def test_a_server_that_never_answers_is_there(monkeypatch):
    monkeypatch.setattr("dataflex_pipeline.reward.endpoint.TRIAL_SECONDS", 0.2)
    with socket.socket() as deaf:
        deaf.bind(("127.0.0.1", 0))
        deaf.listen()
        url = f"http://127.0.0.1:{deaf.getsockname()[1]}/v1/chat/completions"
        assert "ReadTimeout" in try_endpoint(ApiSettings(api_url=url), None)[0]


def test_an_endpoint_that_refuses_connections_stops_a_run_before_its_warm_up(here, tiny_demo, closed):
    text = refused(here, "round", 1, *small(tiny_demo), *NICE, *api(closed))
    assert f"The reward endpoint {closed} cannot be reached" in text
    assert f"{PLACE}.api.api_url" in text
    found = findings(*data(tiny_demo), *NICE, *api(closed), code=2)["rewards of the target"]
    assert (found["state"], found["area"]) == ("problem", "configuration")
    assert "cannot be reached" in found["found"]


@pytest.mark.slow
def test_an_endpoint_is_not_needed_where_nothing_is_left_to_ask(here, tiny_demo):
    settings = (*data(tiny_demo), *SMALL, *STEPS, *NICE, *SHORT, "--run", "judged")
    settings += ("nice.baseline=none",)  # half a point for every answer ranks nothing under a baseline
    with Server(200) as server:
        done("warmup", *settings, *api(server.url))
        assert server.asked == []  # a judge may be started after the warm-up that is asked for alone
        shutil.rmtree(here / "runs" / "judged" / "round-00" / "checkpoint")
        done("round", 1, *settings, *api(server.url))
        assert server.asked[0][:2] == ("GET", "/v1/models")
        assert len(server.asked) > 1
        asked = len(server.asked)
        shutil.rmtree(here / "runs" / "judged" / "round-00" / "checkpoint")
        done("round", 1, *settings, *api(server.url))
        assert len(server.asked) == asked
    shutil.rmtree(here / "runs" / "judged" / "round-00" / "checkpoint")
    done("round", 1, *settings, *api(server.url))


def test_a_key_that_is_not_there(here, tiny_demo, monkeypatch):
    monkeypatch.delenv("DF_TEST_KEY", raising=False)
    with Server(401) as server:
        given = (*NICE, *api(server.url, key="DF_TEST_KEY"))
        text = refused(here, "round", 1, *small(tiny_demo), *given)
        assert f"{PLACE}.api.api_key: DF_TEST_KEY names an environment variable that is not set" in text
        found = findings(*data(tiny_demo), *given, code=2)["rewards of the target"]
        assert "DF_TEST_KEY" in found["found"]
        assert server.asked == []
        monkeypatch.setenv("DF_TEST_KEY", "wrong")
        found = findings(*data(tiny_demo), *given)["rewards of the target"]
        assert (found["state"], "401" in found["found"]) == ("warning", True)


# Models


def judge(folder, backend="local_vllm"):
    return read_settings(backend, {backend: {"hf_model_name_or_path": str(folder)}})


def test_a_judge_that_is_not_there_stops_a_run_before_its_warm_up(here, tiny_demo, monkeypatch):
    pytest.importorskip("vllm")
    monkeypatch.setattr("dataflex_pipeline.reward.judge_files.hub_reachable", lambda: False)
    name = f"{PLACE}.local_vllm.hf_model_name_or_path"
    given = (*NICE, "nice.reward_model_backend=local_vllm", f"{name}=nobody/no-such-judge")
    text = refused(here, "round", 1, *small(tiny_demo), *given)
    assert "nobody/no-such-judge" in text
    assert name in text
    found = findings(*data(tiny_demo), *given, code=2)["rewards of the target"]
    assert name in found["advice"]


def test_a_reward_model_that_is_none(here, tiny_demo):
    name = f"{PLACE}.reward_model.hf_model_name_or_path"
    given = (*NICE, "nice.reward_model_backend=reward_model", f"{name}={tiny_demo.model}")
    text = refused(here, "round", 1, *small(tiny_demo), *given)
    assert "is a LlamaForCausalLM" in text


@pytest.mark.parametrize("damage", ["cut", "index", "tokenizer", "config"])
def test_a_model_whose_files_are_damaged(here, damage):
    folder = make_reward_model(here / "model")
    judge(folder, "reward_model").check()
    weights = folder / "model.safetensors"
    if damage == "cut":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif damage == "index":
        (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "model-2.safetensors"}}')
    else:
        (folder / f"{damage}.json").write_text("{")
    with pytest.raises(UserError) as error:
        judge(folder, "reward_model").check()
    assert f"{PLACE}.reward_model.hf_model_name_or_path" in error.value.fix


def test_an_embedder_out_of_reach(here, tiny_demo, monkeypatch):
    monkeypatch.setattr("dataflex_pipeline.embed.settings.hub_reachable", lambda: False)
    given = ("--method", "tsds", "tsds.embed_model=nobody/no-such-embedder")
    for command in (("estimate",), ("round", 1)):
        assert "nobody/no-such-embedder" in refused(here, *command, *small(tiny_demo), *given)
    found = findings(*data(tiny_demo), *given, code=2)
    assert found["embeddings of the pool"]["state"] == "problem"
    assert "embed_model" in found["embeddings of the pool"]["advice"]


def test_an_embedder_whose_weights_are_cut_off(here, tiny_demo):
    folder = make_reward_model(here / "model")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    given = ("--method", "near", f"near.embed_model={folder}", "near.embed_method=sentence-transformers")
    assert "cannot be read" in refused(here, "round", 1, *small(tiny_demo), *given)


# Quotas


@pytest.mark.parametrize(
    ("quotas", "expected"),
    [("{nothing: 0.5}", "'nothing', which is no source of the pool"), ("{pool: 0.5}", "every source")],
)
def test_quotas_of_sources_that_are_not_there(here, tiny_demo, quotas, expected):
    assert tiny_demo.pool.stem == "pool"
    text = refused(here, "round", 1, *small(tiny_demo), f"source_quotas={quotas}")
    assert expected in text


# Methods that are not in use


def test_values_of_methods_that_are_not_in_use_are_checked(here, tiny_demo):
    (here / "mine.yaml").write_text("methods:\n  less: {proj_dim: -1}\n")
    for command in ("round", "status", "estimate", "doctor"):
        text = refused(here, command, "--config", "mine.yaml", *data(tiny_demo), "component_name=loss")
        assert text.startswith("error: less.proj_dim is -1 ")
    together = ("nice.baseline=leave_one_out", "nice.mc_samples=1")
    text = refused(here, "round", *data(tiny_demo), *together)
    assert "The parameters of nice" in text
    assert "leave_one_out needs mc_samples of at least 2" in text
    assert "There is no run" in refused(here, "status", *data(tiny_demo), "less.proj_dim=64")


def test_parameters_of_nice_are_named_as_they_are_typed(here, tiny_demo):
    for wrong, named in (
        ("nice.reward_model_backend=jury", "nice.reward_model_backend"),
        (f"{PLACE}.api.temprature=1", f"{PLACE}.api.temprature is not a setting"),
        (f"{PLACE}.api.temperature=-1", f"{PLACE}.api.temperature is -1."),
        (f"{PLACE}.jury.x=1", f"{PLACE}.jury is none of the reward backends"),
        (f"{PLACE}.api.api_url=nonsense", f"{PLACE}.api.api_url is not the address"),
        ("nice.reward_model_backend=reward_model", "nice.reward_model_backend: reward_model was chosen"),
    ):
        assert f"error: {named}" in refused(here, "round", *data(tiny_demo), wrong)


@pytest.mark.parametrize("setting", ["weights=importance", "replacement=true"])
def test_settings_of_a_random_draw_for_a_method_that_takes_the_best(here, tiny_demo, setting):
    """The strategy is the method's own, so the configuration alone does not tell."""
    given = (*data(tiny_demo), *STEPS, *SMALL, f"eval_dataset={tiny_demo.target}", "component_name=less")
    text = refused(here, "round", 1, *given, setting)
    assert f"{setting} was set, and less selects by top_k unless told otherwise." in text
    assert "Set strategy=sample, or leave" in text


# Training, before anything is prepared


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("lora_target=nothing", "lora_target names 'nothing'"),
        ("report_to=mlflow", "report_to: mlflow was set."),
        ("keep_checkpoints=true", "keep_checkpoints: true was set without save_steps."),
        ("router_aux_loss_coef=0.1", "router_aux_loss_coef: 0.1 was set."),
    ],
)
def test_what_cannot_train_is_told_before_the_pool_is_prepared(here, tiny_demo, setting, said, monkeypatch):
    monkeypatch.setitem(TRACKERS, "mlflow", ("no_such_package",))
    assert said in refused(here, "round", 1, *small(tiny_demo), setting)
    assert not (here / "runs").exists()


def test_messages_about_bounds_and_about_parameters_that_do_not_go_together(here, tiny_demo):
    text = refused(here, "round", 1, *data(tiny_demo), "score_batch_tokens=0")
    assert "score_batch_tokens takes a whole number of at least 1, or auto." in text
    text = refused(here, "round", 1, *data(tiny_demo), "less.projection=none", "less.proj_dim=64")
    assert "(in less.projection of the configuration, less.proj_dim of the configuration)" in text


def test_a_setting_that_failed_is_not_kept(here):
    def run(**settings):
        return Run(here / "runs" / "mine", dataset="x.jsonl", model_name_or_path="./model", **settings)

    def fail(run, *files):
        with run.writing():
            run.save_settings()
            for file in files:
                file.parent.mkdir(parents=True, exist_ok=True)
                file.touch()
            raise ConfigError("what", "why", "fix")

    place = here / "runs" / "mine"
    with pytest.raises(ConfigError):
        fail(
            run(lora_target="nothing"),
            place / "pool" / "_manifest.json",
            place / "round-00" / "index.parquet",
        )
    assert not list(here.iterdir())
    with run().writing():
        run().save_settings()
    before = snapshot(here)
    with pytest.raises(ConfigError):
        fail(run(lora_target="nothing"))
    assert {name: digest for name, (digest, _) in snapshot(here).items()} == {
        name: digest for name, (digest, _) in before.items()
    }
    with pytest.raises(ConfigError):  # what was made with the settings needs them
        fail(run(learning_rate=0.5), place / "round-01" / "scores" / "loss.parquet")
    assert "learning_rate: 0.5" in (place / "run.yaml").read_text()


def test_a_target_without_any_signal_stops_before_the_pools_pass(here, tiny_demo):
    given = (*data(tiny_demo), *NICE[1:3], "nice.reward_model_backend=metric", "nice.max_new_tokens=1")
    given += ("nice.gradient_type=sgd", "max_samples=12", "lora_rank=2", "fraction=0.5")
    ran = dataflex("pick", "nice", "--run", "x", *given)
    assert ran.code == 2, ran.err
    assert "target rows has a signal" in ran.err
    names = {path.name.partition("-")[0] for path in (here / "runs" / "x" / "features").iterdir()}
    assert names == {"generations", "rewards", "target_directions"}


# Surroundings


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"WORLD_SIZE": "x"}, "WORLD_SIZE is 'x'"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE is '0'"),
        ({"RANK": "3"}, "RANK is 3, and WORLD_SIZE is 1"),
        ({"WORLD_SIZE": "1", "LOCAL_RANK": "\u0663"}, "LOCAL_RANK is "),
    ],
)
def test_a_launcher_that_says_nonsense(here, settings, said, monkeypatch):
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    assert said in refused(here, "methods")


def test_words_that_no_command_takes(here):
    for words in (["round", "--no-such\x1b[2J"], ["nonsense"], ["score", "--round", "x"]):
        text = refused(here, *words)
        assert "takes other words and options" in text
        assert "\x1b" not in text
    assert dataflex().code == 2


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        ImportError("libtorch_cpu.so: failed to map segment from shared object"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"),
        OSError(errno.ENAMETOOLONG, "File name too long", "a" * 300),
    ],
)
def test_limits_of_the_machine_are_told_in_words(error, capsys):
    def command():
        raise error

    assert exit_code(command) == (2 if isinstance(error, OSError) else 1)
    assert capsys.readouterr().err.splitlines()[0].startswith(("error: There is not enough", "error: aaa"))


def test_a_setting_longer_than_a_file_name(here):
    assert "source_quotas" in refused(here, "status", "source_quotas={" + "a" * 300 + ": x}")


def test_any_text_is_written_in_any_encoding(tmp_path):
    from dataflex_pipeline.process.streams import ESCAPED, write_anything

    write_anything()
    value = {"a": "\u6570\U0001f600\xe9"}
    for encoding in ("ascii", "latin-1"):
        text = json.dumps(value, ensure_ascii=False).encode(encoding, ESCAPED)
        assert json.loads(text.decode(encoding)) == value


@pytest.mark.slow
def test_ctrl_c_six_times(here, tiny_demo):
    command = (sys.executable, "-m", "dataflex_pipeline", "round", "1", *small(tiny_demo), "warmup_step=4000")
    with subprocess.Popen(command, stderr=subprocess.PIPE, start_new_session=True, text=True) as process:
        while not (here / "runs" / "pool-loss" / "run.yaml").exists():
            assert process.poll() is None
            time.sleep(0.05)
        for _ in range(6):
            process.send_signal(signal.SIGINT)
            time.sleep(0.02)
        text = process.stderr.read()
    assert process.returncode in (130, -signal.SIGINT)  # Python itself dies of one that comes at its very end
    assert text.endswith("interrupted; the same command goes on from here\n")
    assert "Traceback" not in text


# A method of one's own

OWN = """
import numpy as np

from dataflex_pipeline import api


class Mine(api.Method):
    summary = "mine"
    source = "mine"

    def score(self, block, state):
        TROUBLE
        return {"score": np.ones(block.pool.num_rows)}

    def weigh(self, block, fitted):
        return np.ones(block.num_rows)
"""


@pytest.mark.parametrize("trouble", ["{}['no']", "raise SystemExit(0)"])
def test_a_method_of_ones_own_that_fails(here, tiny_demo, trouble):
    (here / "mine.py").write_text(OWN.replace("TROUBLE", trouble))
    (here / "components.yaml").write_text("mine: {name: mine, file: mine.py}\n")
    given = (*data(tiny_demo), "components_cfg_file=components.yaml", "max_samples=12", "fraction=0.5")
    ran = dataflex("pick", "mine", *given)
    assert ran.code == 2, ran.err
    assert f"mine.py, line 12: {'KeyError' if 'no' in trouble else 'SystemExit: 0'}" in ran.err
    assert ran.err.splitlines()[-1].startswith("-> Correct it")
    (here / "mine.py").write_text(trouble)
    text = refused(here, "pick", "mine", *given)
    assert f"(line 1: {trouble})" in text


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (("num_samples=2000000000",), "num_samples=2000000000: 2,000,000,000 rows at once"),
        (("num_samples=2000000000", "replacement=true"), "num_samples=2000000000"),
        (
            ("token_budget=2000000000", "replacement=true", "cutoff_len=4"),
            "token_budget=2000000000: 500,000,000 rows at once",
        ),
        (("warmup_step=500000000",), "warmup_step=500000000 with 4 rows a step: 2,000,000,000 rows"),
        (("update_step=500000000",), "update_step=500000000 with 4 rows a step: 2,000,000,000 rows"),
        (
            ("per_device_train_batch_size=1000000000",),
            "update_step=2 with 1,000,000,000 rows a step: 2,000,000,000 rows",
        ),
        (("lora_alpha=2000000000",), "lora_alpha: 2000000000"),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else "",
)
def test_more_rows_than_the_memory_holds(here, tiny_demo, monkeypatch, settings, said):
    """On a machine with 32 GiB free, before the data is prepared."""
    monkeypatch.setattr("dataflex_pipeline.pipeline.drawing.available_bytes", lambda: 32 << 30)
    given = tuple(each for each in small(tiny_demo) if each.partition("=")[0] not in str(settings))
    assert said in refused(here, "round", 1, *given, *settings)


def test_a_finished_round_is_selected_anew_only_where_the_memory_holds_it(here, tiny_demo, monkeypatch):
    folder = copied(tiny_demo, here)
    again = ("select", "--run", "base", "runs_dir=.", "--round", 2, "--name")
    done(*again, "half", "fraction=0.5")
    monkeypatch.setattr("dataflex_pipeline.pipeline.drawing.available_bytes", lambda: 32 << 30)
    assert "num_samples=2000000000" in refused(folder, *again, "more", "num_samples=2000000000")


def test_strategies_that_end_with_the_pool_may_be_asked_for_more(here, tiny_demo, monkeypatch):
    monkeypatch.setattr("dataflex_pipeline.pipeline.drawing.available_bytes", lambda: 32 << 30)
    settings = (*small(tiny_demo)[:3], "num_samples=2000000000", "strategy=top_k")
    assert "200 of 200 rows" in done("pick", "perplexity", *settings, "--run", "all")


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="RLIMIT_AS")
@pytest.mark.parametrize(
    "command", [("pick", "perplexity", "fraction=0.1"), ("warmup",), ("estimate",), ("doctor",)]
)
def test_too_little_address_space_for_the_libraries_is_one_error(here, tiny_demo, monkeypatch, command):
    """scipy's BLAS would try for ever to get its buffers."""
    import resource

    monkeypatch.setattr(resource, "getrlimit", lambda which: (1_000_000 << 10, resource.RLIM_INFINITY))
    ran = dataflex(*command, *data(tiny_demo), "--run", "small")
    assert ran.code == 1
    assert "There is not enough memory to load torch and transformers" in ran.err
    assert "Traceback" not in ran.err
    assert not list(here.iterdir())
