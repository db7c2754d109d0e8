"""What a run would stop at later is found before its warm-up: models, packages, quotas, endpoints."""

from __future__ import annotations

import shutil
import socket
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from cli_runs import SMALL, STEPS, data, done, refused, small
from misbehaving_server import reply
from reward_models import make_reward_model
from test_doctor import findings

from dataflex_pipeline.errors import UserError
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
