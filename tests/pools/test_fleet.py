"""The fleet file: what is read, and what every mistake says."""

import re
from pathlib import Path

import pytest

from anypool.pools import EngineSettings, FleetError, load_fleet
from anypool.pools.fleet import api_key, jax_platform, parse_fleet

EXAMPLES = Path(__file__).resolve().parents[2] / "examples" / "fleets"
POOL = '[[pool]]\nname = "a"\nchip = "cpu"\n'
MODEL = '[model]\nid = "m"\n'
EXTERNAL = '[[pool]]\nname = "a"\nchip = "ascend-910c"\nlauncher = "external"\nendpoint = "http://10.0.0.7:8000"\n'


def test_the_default_fleet_is_the_documented_example():
    packaged = Path(load_fleet.__code__.co_filename).with_name("default_fleet.toml")
    assert packaged.read_bytes() == (EXAMPLES / "local-two-pools.toml").read_bytes()


def test_the_default_fleet_is_two_local_cpu_pools():
    fleet = load_fleet()
    assert [(pool.name, pool.chip, pool.launcher) for pool in fleet.pools] == [
        ("cpu-a", "cpu", "local"),
        ("cpu-b", "cpu", "local"),
    ]
    assert fleet.model.id == "smollm2-135m-instruct"
    assert (fleet.gateway.host, fleet.gateway.port) == ("127.0.0.1", 8000)


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.toml")), ids=lambda path: path.name)
def test_every_example_loads(path):
    assert load_fleet(path).serving_pools


def test_the_fleet_file_in_the_documentation_loads():
    page = (EXAMPLES.parents[1] / "docs" / "fleet.md").read_text()
    examples = re.findall(r"(?s)```toml\n(.*?)```", page)
    assert examples
    for text in examples:
        assert parse_fleet(text).serving_pools


def test_every_key_is_read():
    fleet = parse_fleet(
        """
        [fleet]
        name = "dual"
        [model]
        id = "org/model"
        dtype = "bfloat16"
        [gateway]
        host = "0.0.0.0"
        port = 9000
        heartbeat_limit_seconds = 2
        recovery_seconds = 12.5
        [[pool]]
        name = "here"
        chip = "tpu-v6e"
        topology = "1x1"
        provider = "google"
        region = "us-east5"
        roles = ["serve", "train"]
        max_concurrency = 8
        [pool.engine]
        max_num_seqs = 16
        token_budget = 512
        max_model_len = 4096
        kv_cache_gib = 1.5
        max_waiting = 64
        threads = 2
        [[pool]]
        name = "there"
        chip = "ascend-910c"
        topology = "2x8"
        launcher = "external"
        endpoint = "https://example.com/base/v1/"
        api_key_env = "THERE_KEY"
        model = "served-name"
        [[pool]]
        name = "trainer"
        chip = "h100"
        roles = ["train"]
        """
    )
    here, there, _ = fleet.pools
    assert fleet.name == "dual"
    assert (fleet.model.id, fleet.model.dtype) == ("org/model", "bfloat16")
    assert fleet.gateway.port == 9000
    assert fleet.gateway.heartbeat_limit_seconds == 2.0
    assert here.engine == EngineSettings(16, 512, 4096, 1.5, 64, 2)
    assert " ".join(here.engine.flags()) == (
        "--max-num-seqs 16 --token-budget 512 --max-model-len 4096 --kv-cache-gib 1.5 --max-waiting 64 --threads 2"
    )
    assert (here.provider, here.region, here.roles, here.max_concurrency) == (
        "google",
        "us-east5",
        ("serve", "train"),
        8,
    )
    assert (there.endpoint, there.model) == ("https://example.com/base", "served-name")
    assert EngineSettings().flags() == []
    assert [pool.name for pool in fleet.serving_pools] == ["here", "there"]


MISTAKES = {
    "not TOML": ("[fleet", "fleet: not valid TOML: "),
    "unknown table": (
        MODEL + POOL + "[gatway]\nport = 1\n",
        "fleet:6: unknown key 'gatway'; did you mean 'gateway'?",
    ),
    "unknown key": (
        MODEL + POOL + "max_concurency = 3\n",
        "fleet:6: [[pool]] 'a': unknown key 'max_concurency'; did you mean 'max_concurrency'?",
    ),
    "unknown key, nothing close": (
        MODEL + POOL + "[gateway]\nzzz = 1\n",
        "fleet:7: [gateway] unknown key 'zzz'; known here: host, port, heartbeat_limit_seconds, recovery_seconds",
    ),
    "unknown engine key": (
        MODEL + POOL + "[pool.engine]\nthread = 1\n",
        "fleet:7: [pool.engine] of pool 'a': unknown key 'thread'; did you mean 'threads'?",
    ),
    "not yet: state": (
        '[fleet]\nstate = "sqlite:///x"\n' + MODEL + POOL,
        "fleet:2: [fleet] state is not supported yet: remove it",
    ),
    "not yet: launcher": (
        MODEL + POOL + 'launcher = "ray"\n',
        (
            "fleet:6: [[pool]] 'a': launcher = 'ray' is not supported yet: start the worker there yourself and join it "
            'with launcher = "external" and endpoint = "http://..."'
        ),
    ),
    "unknown launcher": (
        MODEL + POOL + 'launcher = "locale"\n',
        "fleet:6: [[pool]] 'a': launcher = 'locale' is unknown; did you mean 'local'?",
    ),
    "no model": (POOL, 'fleet: [model] needs id, for example id = "smollm2-135m-instruct"'),
    "empty model": (
        '[model]\nid = ""\n' + POOL,
        "fleet:2: [model] id = '': must be a text in quotes, for example id = \"smollm2-135m-instruct\"",
    ),
    "model not a table": (
        'model = "m"\n' + POOL,
        "fleet:1: [model] is 'm', but must be a table: write [model] on a line of its own",
    ),
    "dtype": (
        '[model]\nid = "m"\ndtype = "float23"\n' + POOL,
        "fleet:3: [model] dtype = 'float23': must be one of float32, bfloat16; did you mean 'float32'?",
    ),
    "no pool": (MODEL, "fleet: no pool: add at least one [[pool]] table with name and chip"),
    "pool not a list": (
        MODEL + '[pool]\nname = "a"\n',
        "fleet:3: [pool] must be [[pool]]: there is one such table a pool",
    ),
    "no name": (
        MODEL + '[[pool]]\nchip = "cpu"\n',
        'fleet:3: [[pool]] number 1: needs name, for example name = "cpu-a"',
    ),
    "bad name": (
        MODEL + '[[pool]]\nname = "a b"\nchip = "cpu"\n',
        "fleet:4: [[pool]] 'a b': name = 'a b': use letters, digits, dots, dashes and underscores only",
    ),
    "same name": (MODEL + POOL + POOL, "fleet:7: two pools are named 'a': give each pool its own name"),
    "no chip": (MODEL + '[[pool]]\nname = "a"\n', "fleet:3: [[pool]] 'a': needs chip, for example chip = \"cpu\""),
    "unknown chip": (
        MODEL + '[[pool]]\nname = "a"\nchip = "abacus"\n',
        "fleet:5: [[pool]] 'a': chip = 'abacus': there is no chip 'abacus': `anypool chips` lists them",
    ),
    "nearly a chip": (
        MODEL + '[[pool]]\nname = "a"\nchip = "tpu-v6"\n',
        "fleet:5: [[pool]] 'a': chip = 'tpu-v6': there is no chip 'tpu-v6'; did you mean 'tpu-v6e'?",
    ),
    "a chip without JAX": (
        MODEL + '[[pool]]\nname = "a"\nchip = "910c"\n',
        (
            "fleet:5: [[pool]] 'a': chip = 'ascend-910c': JAX does not run on it: join what serves there with "
            'launcher = "external" and endpoint = "http://..."'
        ),
    ),
    "topology": (
        MODEL + POOL + 'topology = "4 x 4"\n',
        'fleet:6: [[pool]] \'a\': topology = \'4 x 4\': write it like "8", "4x4" or "4x4x8"',
    ),
    "topology of a local pool": (
        MODEL + POOL + 'topology = "2x2"\n',
        "fleet:6: [[pool]] 'a': topology = '2x2': a local pool runs on one chip so far, use \"1\"",
    ),
    "roles": (
        MODEL + POOL + 'roles = ["server"]\n',
        (
            "fleet:6: [[pool]] 'a': roles = ['server']: 'server' is not one of serve, train, multimodal, agents, "
            "backup; did you mean 'serve'?"
        ),
    ),
    "roles not a list": (
        MODEL + POOL + 'roles = "serve"\n',
        "fleet:6: [[pool]] 'a': roles = 'serve': must be a list of texts, for example roles = [\"serve\"]",
    ),
    "roles twice": (
        MODEL + POOL + 'roles = ["serve", "serve"]\n',
        "fleet:6: [[pool]] 'a': roles = ['serve', 'serve']: names one twice; name each once",
    ),
    "nobody serves": (
        MODEL + POOL + 'roles = ["train"]\n',
        'fleet: no pool serves: add "serve" to the roles of at least one [[pool]]',
    ),
    "port too large": (
        MODEL + POOL + "[gateway]\nport = 99999\n",
        "fleet:7: [gateway] port = 99999: must be a whole number from 0 to 65535, for example port = 8000",
    ),
    "port a text": (
        MODEL + POOL + '[gateway]\nport = "8000"\n',
        "fleet:7: [gateway] port = '8000': must be a whole number from 0 to 65535, for example port = 8000",
    ),
    "port a truth": (
        MODEL + POOL + "[gateway]\nport = true\n",
        "fleet:7: [gateway] port = True: must be a whole number from 0 to 65535, for example port = 8000",
    ),
    "no heartbeat": (
        MODEL + POOL + "[gateway]\nheartbeat_limit_seconds = 0\n",
        (
            "fleet:7: [gateway] heartbeat_limit_seconds = 0: must be a number greater than 0, for example "
            "heartbeat_limit_seconds = 5"
        ),
    ),
    "infinite": (
        MODEL + POOL + "[gateway]\nrecovery_seconds = inf\n",
        "fleet:7: [gateway] recovery_seconds = inf: must be a number greater than 0, for example recovery_seconds = 30",
    ),
    "max_concurrency": (
        MODEL + POOL + "max_concurrency = 0\n",
        (
            "fleet:6: [[pool]] 'a': max_concurrency = 0: must be a whole number of at least 1, for example "
            "max_concurrency = 64"
        ),
    ),
    "engine": (
        MODEL + POOL + "[pool.engine]\ntoken_budget = 8\n",
        (
            "fleet:7: [pool.engine] of pool 'a': token_budget = 8: must be a whole number of at least 16, for example "
            "token_budget = 512"
        ),
    ),
    "external without endpoint": (
        MODEL + POOL + 'launcher = "external"\n',
        "fleet:3: [[pool]] 'a': needs endpoint, for example endpoint = \"http://10.0.0.7:8000\"",
    ),
    "local with endpoint": (
        MODEL + POOL + 'endpoint = "http://x"\n',
        "fleet:6: [[pool]] 'a': endpoint is for external pools: add launcher = \"external\" or remove it",
    ),
    "local with a key": (
        MODEL + POOL + 'api_key_env = "KEY"\n',
        "fleet:6: [[pool]] 'a': api_key_env is for external pools: remove it",
    ),
    "local with a model": (
        MODEL + POOL + 'model = "x"\n',
        "fleet:6: [[pool]] 'a': model is for external pools: a local pool serves the fleet's [model] id",
    ),
    "external with an engine": (
        MODEL + EXTERNAL + "[pool.engine]\nthreads = 1\n",
        "fleet:8: [[pool]] 'a': [pool.engine] is for local pools: an external engine has its own flags",
    ),
    "endpoint without scheme": (
        MODEL + EXTERNAL.replace("http://", ""),
        "fleet:7: [[pool]] 'a': endpoint = '10.0.0.7:8000': must be an address such as \"http://10.0.0.7:8000\"",
    ),
    "endpoint with a password": (
        MODEL + EXTERNAL.replace("http://", "http://me:secret@"),
        "fleet:7: [[pool]] 'a': endpoint holds a password: put it into a variable named by api_key_env",
    ),
    "the key itself": (
        MODEL + EXTERNAL + 'api_key_env = "sk-secret"\n',
        "fleet:8: [[pool]] 'a': api_key_env must be the name of an environment variable, such as \"UPSTREAM_API_KEY\"",
    ),
}


@pytest.mark.parametrize(("text", "message"), MISTAKES.values(), ids=MISTAKES.keys())
def test_a_mistake_names_line_field_value_and_fix(text, message):
    with pytest.raises(FleetError) as caught:
        parse_fleet(text)
    assert str(caught.value).startswith(message) if message.endswith(" ") else str(caught.value) == message
    assert "secret" not in str(caught.value)


def test_a_missing_file_names_its_neighbours(tmp_path):
    (tmp_path / "dual.toml").write_text("")
    with pytest.raises(
        FleetError, match=re.escape("duel.toml: there is no such fleet file; did you mean 'dual.toml'?")
    ):
        load_fleet(tmp_path / "duel.toml")
    with pytest.raises(FleetError, match=r"there is no such fleet file$"):
        load_fleet(tmp_path / "elsewhere" / "dual.toml")


def test_a_file_that_is_no_text_is_refused(tmp_path):
    (tmp_path / "fleet.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(FleetError, match=r"fleet\.toml: cannot be read as a fleet file"):
        load_fleet(tmp_path / "fleet.toml")
    with pytest.raises(FleetError, match="cannot be read as a fleet file"):
        load_fleet(tmp_path)


def test_a_model_path_with_a_dot_is_relative_to_the_file(tmp_path):
    (tmp_path / "fleet.toml").write_text('[model]\nid = "./weights/tiny.gguf"\n' + POOL)
    model = load_fleet(tmp_path / "fleet.toml").model
    assert model.id == str(tmp_path / "weights" / "tiny.gguf")
    assert model.name == "tiny"


@pytest.mark.parametrize(
    ("model", "name"),
    [
        ("smollm2-135m-instruct", "smollm2-135m-instruct"),
        ("org/name", "org/name"),
        ("/data/Llama-3.2-1B", "Llama-3.2-1B"),
    ],
)
def test_what_clients_call_the_model(model, name):
    assert parse_fleet(f'[model]\nid = "{model}"\n' + POOL).model.name == name


def test_a_key_comes_from_the_environment():
    spec = parse_fleet(MODEL + EXTERNAL + 'api_key_env = "UPSTREAM"\n').pools[0]
    assert api_key(spec, {"UPSTREAM": "sk-1"}) == "sk-1"
    with pytest.raises(FleetError, match=r"names UPSTREAM, which is not set: export UPSTREAM=\.\.\. or remove"):
        api_key(spec, {})


@pytest.mark.parametrize(
    ("chip", "platform"),
    [
        *(("cpu", "cpu"), ("tpu-v6e", "tpu"), ("tpu7x", "tpu"), ("v5e", "tpu"), ("trn2", "neuron")),
        *(("mi300x", "rocm"), ("h100", "cuda"), ("gb200", "cuda"), ("ascend-910c", None)),
    ],
)
def test_a_chips_name_says_its_platform(chip, platform):
    assert jax_platform(chip) == platform
