"""What leaves the machine with a configuration: secrets of many kinds, planted anywhere, do not;
what a recipe needs to run does."""

import base64
import hashlib
import json
import re
import time
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from recorded_run import NULL_PROMPT, recorded_run

from bdpo_plugin import BDPOSettings, private_text
from bdpo_plugin.cli.recipes.bundle import shared_recipe, shared_record
from bdpo_plugin.hosts.axolotl import side_effects as of_axolotl
from bdpo_plugin.hosts.llamafactory import side_effects as of_llamafactory
from bdpo_plugin.hosts.trl import side_effects as of_trl
from bdpo_plugin.output.model_card import complete_card
from bdpo_plugin.private_text import is_secret_name, private_in
from bdpo_plugin.recipes.recipe_file import is_sweep, read_recipe, recipe_files, recipe_root
from bdpo_plugin.recipes.shareable import private_findings
from bdpo_plugin.redact import (
    REDACTED,
    configuration_text,
    digest_of,
    missing,
    redacted,
    without_texts,
)
from bdpo_plugin.settings import RECIPE

HOSTS = {"axolotl": of_axolotl, "llamafactory": of_llamafactory, "trl": of_trl}


def body(seed: int, length: int, alphabet: str = "") -> str:
    """Letters and digits that are as random as those of a key, and in no ordinary configuration."""
    found = hashlib.sha512(str(seed).encode()).digest()
    if alphabet:
        return "".join(alphabet[byte % len(alphabet)] for byte in found)[:length]
    return re.sub(r"[^A-Za-z0-9]", "", base64.b64encode(found).decode())[:length]


DIGITS = "0123456789"
HEX = "0123456789abcdef"
CAPITALS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ234567"
LETTERS = "abcdefghijklmnopqrstuvwxyz"
#: The same letters and digits in full width.
WIDE = {ord(c): chr(ord(c) + 0xFEE0) for c in DIGITS + LETTERS + LETTERS.upper()}

#: Kind -> the text around the secret part, its length, its characters. No whole secret is in this
#: file, so that no scanner takes it for a leak.
FORMS: dict[str, tuple] = {
    "hugging face": ("hf_{}", 34),
    "openai": ("sk-{}", 40),
    "openai of a project": ("sk-proj-{}", 40),
    "github": ("ghp_{}", 36),
    "github, fine": ("github_pat_{}", 40),
    "gitlab": ("glpat-{}", 20),
    "grafana": ("glsa_{}", 32),
    "aws": ("AKIA{}", 16, CAPITALS),
    "aws, of a session": ("ASIA{}", 16, CAPITALS),
    "google": ("AIza{}", 35),
    "slack": ("xoxb-{}", 24),
    "slack, webhook": ("https://hooks.slack.com/services/T0/B0/{}", 9),
    "discord, webhook": ("https://discord.com/api/webhooks/1/{}", 9),
    "feishu, webhook": ("https://open.feishu.cn/open-apis/bot/v2/hook/{}", 8),
    "jwt": ("eyJ0.{}.x", 20),
    "key file": ("-----BEGIN RSA PRIVATE KEY-----\n{}\n-----END", 50),
    "npm": ("npm_{}", 36),
    "pypi": ("pypi-{}", 50),
    "sendgrid": ("SG.{}.x", 22),
    "digital ocean": ("dop_v1_{}", 40, HEX),
    "telegram": ("123456789:{}", 35),
    "wandb": ("{}", 40, HEX),
    "wandb, in capitals": ("{}", 40, "0123456789ABCDEF"),
    "random": ("{}", 40),
    "user of a url": ("https://me:{}@example.com/x.jsonl", 8),
    "signed url": ("https://s3.example.com/x?X-Amz-Signature={}", 9, HEX),
    "parameter": ("https://example.com/x?a=1&access_token={}", 8),
    "parameter, quoted": ("https://example.com/x?to%6ben={}", 8),
    "bearer": ("Authorization: Bearer {}", 12),
    "postgres": ("postgresql+psycopg2://db.example.com/{}", 8),
    "redis": ("rediss://:{}@example.com:6379/0", 8),
    "sentry": ("https://{}@o1.ingest.sentry.io/2", 12, LETTERS),
    "sentence": ("the password is {}", 8, LETTERS),
    "command": ("fetch --api-key {} x", 8, LETTERS),
    "variable": ("HF_TOKEN={} make data", 8, LETTERS),
    "invisible": ("ghp\u200b_{}", 36),
    "another alphabet": ("p\u0430ssword: {}", 8, LETTERS),
    "e-mail": ("{}@example.com", 8, LETTERS),
    "host": ("{}.corp.internal", 8, LETTERS),
    "host with a port": ("{}:5000", 8, LETTERS),
    "host of a url": ("http://{}/x", 8, LETTERS),
    "address": ("10.20.30.{}", 2, "123456789"),
    "path": ("/srv/{}/pairs.jsonl", 8, LETTERS),
    "path of windows": ("C:\\Users\\{}\\pairs.jsonl", 8, LETTERS),
    "share": ("\\\\{}\\data\\pairs.jsonl", 8, LETTERS),
    "home": ("~{}/pairs.jsonl", 8, LETTERS),
    "path in words": ("as in /{}/notes".format("home/{}"), 8, LETTERS),
}
#: Kinds that are coded: text around the secret part, how all of it is coded, text around that.
CODED = {
    "basic": ("me:{}", lambda text: base64.b64encode(text.encode()).decode(), "Basic {}"),
    "base64": ("password={}", lambda text: base64.b64encode(text.encode()).decode(), "{}"),
    "wide": ("ghp_{}", lambda text: text.translate(WIDE), "{}"),
}
KINDS = (*FORMS, *CODED)


def secret_of(kind: str, seed: int) -> tuple[str, str]:
    """What is planted, and what must not come through."""
    if kind in CODED:
        form, code, around = CODED[kind]
        found = code(form.format(body(seed, 36)))
        return around.format(found), found
    form, length, *alphabet = FORMS[kind]
    found = body(seed, length, *alphabet)
    return form.format(found), found if len(found) > 2 else form.format(found)


#: Names under which anything is a secret.
NAMES = (
    *(
        "password",
        "db_passwd",
        "wandb_apikey",
        "WANDB_API_KEY",
        "lark_secret",
        "awsSecretAccessKey",
    ),
    *("api-key", "hub token", "auth", "Authorization", "client_secret", "private_key", "cookie"),
    *("aws_access_key_id", "slack_webhook_url", "sentry_dsn", "credentials", "accessToken"),
)
planted = st.one_of(
    st.tuples(st.sampled_from(KINDS), st.integers(0, 10**6)).map(
        lambda drawn: ("", *secret_of(*drawn))
    ),
    st.tuples(st.sampled_from(NAMES), st.integers(0, 10**6)).map(
        lambda drawn: (drawn[0], *(body(drawn[1], 8, LETTERS),) * 2)
    ),
    st.tuples(st.sampled_from(NAMES), st.integers(10**9, 10**10)).map(
        lambda drawn: (drawn[0], drawn[1], str(drawn[1]))
    ),
)

NAME = st.sampled_from(("stage", "offload", "steps", "of", "list", "x y", "Größe", "a.b", "1"))
SCALAR = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-5, 5000),
    st.floats(1e-8, 1e3),
    st.sampled_from(
        ("auto", "adamw_torch", "./data/pairs.jsonl", "Qwen/Qwen3-0.6B", "5e-6", "# x")
    ),
)
TREE = st.recursive(
    SCALAR, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAME, inner, max_size=3)
)


@st.composite
def leaks(draw) -> tuple[dict, str]:
    """A configuration with a secret somewhere in it, and what must not come through."""
    name, secret, needle = draw(planted)
    if isinstance(secret, str) and not name:
        before, after = draw(st.sampled_from((("", ""), ("", ""), ("see ", ""), ("", " (mine)"))))
        secret = f"{before}{secret}{after}"
    value = {name: secret} if name else secret
    as_key = isinstance(value, str) and "\n" not in value and draw(st.booleans())
    for kind in draw(st.lists(st.sampled_from(("list", "mapping", "twice")), max_size=4)):
        if as_key:
            value, as_key = {value: draw(TREE)}, False
        elif kind == "list":
            value = [*draw(st.lists(TREE, max_size=2)), value]
        elif kind == "mapping":
            value = {**draw(st.dictionaries(NAME, TREE, max_size=2)), draw(NAME): value}
        else:  # an anchor and an alias, where it is no scalar
            value = {"a": value, "b": value}
    place = draw(
        st.sampled_from(("deepspeed", "lr_scheduler_kwargs", "plugins", "datasets", RECIPE))
    )
    if place == "datasets":
        value = [{"path": value, "type": "chat_template.default"}]
    if place == RECIPE:
        value = {draw(st.sampled_from(("title", "author", "needs", "data", "verified"))): value}
    return {"base_model": "Qwen/Qwen3-0.6B", "rl": "bdpo", place: value, "seed": 1}, needle


@st.composite
def written(draw) -> tuple[str, str]:
    """The same as a file, with comments and a style of its own."""
    config, needle = draw(leaks())
    style = {
        "default_style": draw(st.sampled_from((None, '"', "'", "|", ">"))),
        "default_flow_style": draw(st.sampled_from((None, True, False))),
        "width": draw(st.sampled_from((20, 80, 10**6))),
        "allow_unicode": draw(st.booleans()),
    }
    text = yaml.safe_dump(config, sort_keys=False, **style)
    _, secret, _ = draw(planted)
    comment = " ".join(f"# {secret}".split())
    return f"{comment}\n---\n{text}{comment}\n", needle


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    return recorded_run(tmp_path_factory.mktemp("run"))


FUZZ = settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@FUZZ
@given(written(), st.booleans())
def test_no_secret_comes_through(run, drawn, texts) -> None:
    """From a file to recipe.yml, the card and the bundle, also that of a run that kept the file as
    it was; and `bdpo recipes check` tells of it."""
    text, needle = drawn
    config = yaml.safe_load(text)
    recorded = configuration_text(config)
    assert needle not in recorded
    assert yaml.safe_load(recorded).keys() == config.keys()
    complete_card(run, BDPOSettings(), configuration=config)
    assert needle not in (run / "README.md").read_text(encoding="utf-8")
    for kept in (recorded, text):
        (run / "bdpo" / "recipe.yml").write_text(kept, encoding="utf-8")
        recipe, _ = shared_recipe(run, texts=texts)
        assert needle not in recipe.text
    assert not list(private_findings(recipe.text))
    assert list(private_findings(text))


@pytest.mark.parametrize("kind", KINDS)
def test_a_secret_alone_in_a_comment_or_in_words_is_seen(kind) -> None:
    secret, needle = secret_of(kind, 7)
    assert needle in secret
    assert redacted([secret])[1]
    assert private_in(f"see {secret}")
    assert list(private_findings(f"a: 1  # see {secret.splitlines()[0]}\n"))


@pytest.mark.parametrize("name", NAMES)
def test_names_of_secrets(name) -> None:
    assert is_secret_name(name)
    shown, _ = redacted({"a": [{name: {"b": ["x", 1, True, None]}}], name: "y"})
    assert shown == {"a": [{name: {"b": [REDACTED, REDACTED, True, None]}}], name: REDACTED}


def test_the_detectors_are_those_of_detect_secrets(monkeypatch) -> None:
    artifactory = "AKC" + body(5, 14, LETTERS)  # of which we have no rule
    assert private_in(artifactory) == "looks like a token or a key"
    assert len(private_text._detectors()) >= 20
    monkeypatch.setattr(private_text, "_detectors", lambda: ())
    assert private_in(artifactory) is None


# --- what stays ----------------------------------------------------------------------------------

RECIPES = {n: p for n, p in recipe_files(recipe_root()).items() if not is_sweep(n)}


@pytest.mark.parametrize("name", RECIPES)
def test_our_recipes_lose_nothing_that_they_need(name) -> None:
    recipe = read_recipe(RECIPES[name], name)
    config = {**recipe.config, RECIPE: recipe.about}
    assert redacted(config) == (config, [])
    kept = HOSTS[recipe.host].for_sharing(config)
    gone = config.keys() - kept.keys()
    assert gone <= HOSTS[recipe.host].DROPPED
    assert list(kept) == [key for key in config if key not in gone]
    # texts are the exception, and told of
    assert {place[0] for place, _ in missing(without_texts(recipe.config))} <= {
        *("chat_template_jinja", "default_system"),
    }
    assert yaml.safe_load(configuration_text(config)) == config


#: Values that recipes have.
ORDINARY = st.one_of(
    SCALAR.filter(lambda value: value != "# x"),
    st.sampled_from(
        (
            *("meta-llama/Llama-3.3-70B-Instruct", "nvidia/Llama-3_3-Nemotron-Super-49B-v1_5"),
            *("deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B", "xai-org/grok-2", "openai/gpt-oss-120b"),
            *("unsloth/Qwen2.5-VL-72B-Instruct-bnb-4bit", "TheBloke/Llama-2-7B-Chat-GPTQ"),
            *("princeton-nlp/llama3-ultrafeedback-armorm", "PKU-Alignment/PKU-SafeRLHF-30K"),
            *(
                "kernels-community/flash-attn2@" + body(3, 40, HEX),
                "train[:90%]",
                "chat_template.default",
            ),
            *(
                "./outputs/run-20261130T101112Z/checkpoint-100",
                "../data/train.jsonl",
                "zero3_bf16.json",
            ),
            *("model.layers.(?:0|1|2).self_attn.(q|k|v)_proj", "^(?!.*vision).*(q_proj|k_proj)$"),
            *(
                "LlamaDecoderLayer",
                "FULL_SHARD",
                "<|im_end|>",
                "</s>",
                "[/INST]",
                "2026-11-30",
                "12:30:45",
            ),
            *(
                "axolotl.integrations.cut_cross_entropy.CutCrossEntropyPlugin",
                "s3://bucket/pairs.jsonl",
            ),
            "https://huggingface.co/datasets/org/name/resolve/main/data.jsonl?download=true",
            "https://raw.githubusercontent.com/org/repo/" + body(4, 40, HEX) + "/data.jsonl",
        )
    ),
)
VALUES = st.recursive(
    ORDINARY, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAME, inner, max_size=3)
)


@pytest.mark.parametrize("host", HOSTS)
@FUZZ
@given(st.data())
def test_ordinary_recipes_lose_nothing_that_they_need(host, data) -> None:
    keys = sorted(HOSTS[host].KEYS - HOSTS[host].DROPPED - {"axolotl_config_path", "plugins"})
    config = data.draw(st.dictionaries(st.sampled_from(keys), VALUES, min_size=1, max_size=8))
    secret = {key for key in config if is_secret_name(key)}
    logins = {"hf_hub_token", "ms_hub_token", "om_hub_token"}  # which others have of their own
    assert secret <= {*logins, "hf_use_auth_token"}
    assert not logins & HOSTS[host].for_sharing(config).keys()
    config = {key: value for key, value in config.items() if key not in secret}
    assert redacted(HOSTS[host].for_sharing(config)) == (config, [])
    again = yaml.safe_load(configuration_text(config))
    assert again == config or json.dumps(again) == json.dumps(config)


def test_commits_and_our_digests_stay(tmp_path) -> None:
    commit, digest = body(1, 40, HEX), body(2, 32, HEX)
    config = {
        "revision_of_model": commit,
        "datasets": [{"path": "some/pairs", "revision": commit}],
        RECIPE: {
            "data": {"command": f"bdpo data x --revision {commit}", "revision": commit},
            "expected": {"rows": digest, "chat_template": digest, "null_prompt": digest},
        },
    }
    assert redacted(config) == (config, [])
    assert redacted({"seed": commit})[0] == {"seed": REDACTED}


def test_paths_become_relative_and_stay_apart(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = {
        "output_dir": str(tmp_path / "out" / "run"),
        "datasets": [{"path": "/srv/a/pairs.jsonl"}, {"path": "/srv/b/pairs.jsonl"}],
        "test_datasets": [{"path": "/srv/a/pairs.jsonl"}],
        "adapter_name_or_path": "/srv/a,/srv/b",
        "deepspeed": "C:\\ds\\zero3.json",
        "base_model": Path("/models/mine"),
        "lora_target_modules": ("q_proj", "v_proj"),
        "default_system": "/no_think",
    }
    shown, changes = redacted(config)
    assert shown == {
        "output_dir": "./out/run",
        "datasets": [{"path": "./pairs.jsonl"}, {"path": "./pairs-2.jsonl"}],
        "test_datasets": [{"path": "./pairs.jsonl"}],
        "adapter_name_or_path": "./a,./b",
        "deepspeed": "./zero3.json",
        "base_model": "./mine",
        "lora_target_modules": ["q_proj", "v_proj"],
        "default_system": "/no_think",
    }
    assert {change.became for change in changes} <= {*json.dumps(shown).split('"')}


def test_the_folder_itself_and_a_root_are_relative(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    paths = [str(tmp_path), f"{tmp_path}/", "/", "~", f"{tmp_path}/.hidden", "/srv/.hidden"]
    shown, _ = redacted(paths)
    assert shown[0] == "."
    assert shown[4:] == ["./.hidden", "./-2.hidden"]
    assert not [path for path in shown if str(tmp_path) in path or path.startswith(("/", "~"))]


@pytest.mark.parametrize("text", ["a", "a-", "a.", "?", "a@", "A1", "/a", ":", "a=", "--a ", "0:"])
def test_very_long_texts_take_no_long_time(text) -> None:
    """Each pattern is linear in the length."""
    began = time.process_time()
    private_in(text * 20_000)
    assert time.process_time() - began < 5
    secret, _ = secret_of("hugging face", 1)
    assert private_in(f"{text * 20_000} {secret}")


def test_what_yaml_cannot_say_is_left_out_and_what_is_in_itself_ends() -> None:
    endless: dict = {}
    endless["again"] = endless
    shown, changes = redacted({"a": b"\xff", "b": object(), "c": endless})
    assert (shown["a"], shown["b"]) == (REDACTED, REDACTED)
    assert len(changes) == 3
    configuration_text({"c": endless})


def test_texts_are_digests_unless_asked(run) -> None:
    text = "You are the assistant of Acme. The word is zebra."
    data = {"path": "some/pairs", "chat_template_jinja": f"{text}\n{{% x %}}"}
    config = {
        "base_model": "Qwen/Qwen3-0.6B",
        "rl": "bdpo",
        "chat_template_jinja": f"{text} {{{{ x }}}}",
        "bdpo_null_prompt": text,
        "datasets": [data],
        RECIPE: {"title": "Mine", "expected": {"null_prompt": text}},
    }
    (run / "bdpo" / "recipe.yml").write_text(configuration_text(config))
    assert text in (run / "bdpo" / "recipe.yml").read_text()
    recipe, changes = shared_recipe(run, texts=False)
    assert changes == []
    record = json.dumps(shared_record(run, texts=False))
    assert "zebra" not in recipe.text + record
    assert recipe.about["expected"]["null_prompt"] == digest_of(NULL_PROMPT)
    assert digest_of(NULL_PROMPT) in record
    assert [(place[0], is_text) for place, is_text in missing(recipe.config)] == [
        ("chat_template_jinja", True),
        ("bdpo_null_prompt", True),
        ("datasets", True),
    ]
    recipe, _ = shared_recipe(run, texts=True)
    assert {**config, RECIPE: None} == {**recipe.config, RECIPE: None}
    assert recipe.about["expected"]["null_prompt"] == NULL_PROMPT
    assert "zebra" in json.dumps(shared_record(run, texts=True))
