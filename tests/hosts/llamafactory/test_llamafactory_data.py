"""LLaMA-Factory's data: what is dropped, what is refused, what is scored in each step."""

import json
import re
import shutil
from datetime import datetime

import pytest

pytest.importorskip("llamafactory")

from llamafactory_runs import curve, run, scores
from transformers import AutoTokenizer

from bdpo_plugin.settings import BDPOError
from bdpo_plugin.training.template_dates import TemplateDates

pytestmark = pytest.mark.slow


@pytest.fixture
def with_rows(tiny, tmp_path):
    """A copy of the data of the tiny model with other rows in front."""

    def make(*rows):
        (tmp_path / "dataset_info.json").write_text((tiny / "dataset_info.json").read_text())
        usual = (tiny / "train.jsonl").read_text().splitlines()[:4]
        lines = [*map(json.dumps, rows), *usual]
        (tmp_path / "train.jsonl").write_text("\n".join(lines) + "\n")
        return {"dataset_dir": str(tmp_path)}

    return make


def row(chosen, rejected):
    sides = {"chosen": chosen, "rejected": rejected}
    messages = [{"role": "user", "content": "How?"}]
    answers = {k: {"role": "assistant", "content": v} for k, v in sides.items()}
    return {"messages": messages, **answers}


def test_rows_that_cannot_teach_are_dropped(tiny, tmp_path, capfd, with_rows):
    data = with_rows(row("One.", "Two."), row("The same.", "The same."))
    done = run(tiny, tmp_path / "run", max_steps=1, **data)
    out = capfd.readouterr().out
    assert "1 of 6 pairs of the train data: chosen and rejected are identical" in out
    assert scores(done)["row"] == [0, 2, 3, 4, 5]


def test_bad_rows_are_told_at_once(tiny, tmp_path, with_rows):
    nobody = row("One.", "Two.") | {"messages": [{"role": "critic", "content": "How?"}]}
    data = with_rows(
        row(None, "Two."), row("One.", "Two."), nobody, row("One.", "") | {"chosen": None}
    )
    with pytest.raises(BDPOError) as raised:
        run(tiny, tmp_path / "run", **data)
    for words in (
        "1 of 8 rows: the `content` of a message of `chosen` is None (rows 0). Remove these rows",
        "the `role` of a message of `messages` is 'critic' (rows 2). Name it in `tags` of",
        "1 of 8 rows: `chosen` is None (rows 3)",
    ):
        assert words in str(raised.value)


def test_rows_that_llamafactory_drops_are_told(tiny, tmp_path, capfd, with_rows):
    turns = [{"role": r, "content": "How?"} for r in ("user", "assistant")]
    data = with_rows(row("One.", "Two."), row("One.", "Two.") | {"messages": turns})
    done = run(tiny, tmp_path / "run", max_steps=1, **data)
    out = " ".join(capfd.readouterr().out.replace("│", " ").split())
    assert "1 of 6 rows of the train.jsonl data: the turns do not alternate between user" in out
    assert "LLaMA-Factory drops them (rows 1)" in out
    assert len(scores(done)["row"]) == 5


def test_a_bad_row_of_a_stream_is_named(tiny, tmp_path, with_rows):
    data = with_rows(row("One.", "Two."), row(None, "Two."))
    options = {"streaming": True, "max_steps": 2, "preprocessing_num_workers": None}
    with pytest.raises(BDPOError, match=r"Row 1 of the train.jsonl data, a stream, .* is None"):
        run(
            tiny,
            tmp_path / "run",
            bdpo_precompute=False,
            dataloader_num_workers=1,
            **options,
            **data,
        )


def test_nothing_left_is_refused(tiny, tmp_path, with_rows):
    data = with_rows()
    (tmp_path / "train.jsonl").write_text(json.dumps(row("Same.", "Same.")) + "\n")
    with pytest.raises(BDPOError, match="chosen and rejected are identical"):
        run(tiny, tmp_path / "run", **data)


def test_images_are_refused(tiny, tmp_path, save_tokens):
    save_tokens(images=["cat.png"])
    with pytest.raises(BDPOError, match="Row 1 of the train data has images"):
        run(tiny, tmp_path / "run", tokenized_path=str(tmp_path / "tokens"))


@pytest.fixture
def save_tokens(tmp_path):
    """A tokenised dataset whose second row has media, with constant columns beside."""
    from datasets import Dataset, DatasetDict

    def save(columns=(), **media):
        text = {"images": None, "videos": None, "audios": None}
        for i, side in enumerate(("chosen", "rejected")):
            text |= {f"{side}_input_ids": [5, 6, 7 + i], f"{side}_labels": [-100, -100, 7 + i]}
            text[f"{side}_attention_mask"] = [1] * 3
        rows = Dataset.from_list([text, text | media])
        for name, value in columns:
            rows = rows.add_column(name, [value] * 2)
        DatasetDict({"train": rows}).save_to_disk(tmp_path / "tokens")

    return save


def test_columns_named_as_results_are_left_out(tiny, tmp_path, capfd, save_tokens):
    options = {"tokenized_path": str(tmp_path / "tokens"), "per_device_train_batch_size": 1}
    for precompute in (True, False):
        name = str(precompute)
        save_tokens()
        plain = run(tiny, tmp_path / f"plain{name}", bdpo_precompute=precompute, **options)
        shutil.rmtree(tmp_path / "tokens")
        scores = [("bdpo_scale", 0.1), ("ref_chosen_logps", 0.0), ("bdpo_weight_chosen", 9.0)]
        save_tokens([*scores, ("length", "short")])
        done = run(tiny, tmp_path / name, bdpo_precompute=precompute, **options)
        out = " ".join(capfd.readouterr().out.replace("│", " ").split())
        assert "columns named as results of a run: bdpo_scale" in out
        for metric in ("loss", "bdpo/scale", "bdpo/weight_chosen"):
            assert curve(done, metric) == curve(plain, metric)
        shutil.rmtree(tmp_path / "tokens")


def test_multimodal_template_is_refused(tiny, tmp_path):
    from llamafactory.data.template import TEMPLATES

    from bdpo_plugin.hosts.llamafactory.tokenised import check_collator

    collator = type("Collator", (), {"label_pad_token_id": -100, "template": None})()
    collator.template = TEMPLATES["chatml"]
    check_collator(collator)
    collator.template = TEMPLATES["qwen2_vl"]
    with pytest.raises(BDPOError, match="multimodal"):
        check_collator(collator)


def test_training_on_the_padding_is_refused(tiny, tmp_path):
    with pytest.raises(BDPOError, match="ignore_pad_token_for_loss"):
        run(tiny, tmp_path / "run", ignore_pad_token_for_loss=False)


def test_streams(tiny, tmp_path):
    workers = {"preprocessing_num_workers": None, "dataloader_num_workers": 1}
    stream = {"streaming": True, "max_steps": 2, **workers}
    with pytest.raises(BDPOError, match="is a stream, which cannot be scored before training"):
        run(tiny, tmp_path / "before", **stream)
    done = run(tiny, tmp_path / "during", bdpo_precompute=False, **stream)
    assert len(curve(done, "bdpo/imbalance")) == 2
    assert min(curve(done, "bdpo/imbalance")) > 0


def test_streams_are_filtered_as_they_come(tiny, tmp_path, capfd, with_rows):
    data = with_rows(row("One.", "Two."), row("The same.", "The same."))
    run(
        tiny,
        tmp_path / "run",
        bdpo_precompute=False,
        streaming=True,
        max_steps=2,
        preprocessing_num_workers=None,
        dataloader_num_workers=1,
        **data,
    )
    out = " ".join(capfd.readouterr().out.replace("│", " ").split())
    assert "a pair of the train data, a stream: chosen and rejected are identical (dropped;" in out
    assert re.search(r"[12] of the \d+ pairs read from the train data, a stream: chosen and", out)


def test_each_evaluation_set_has_scores_of_its_own(tiny, tmp_path):
    sets = {"eval_dataset": "eval,train", "eval_on_each_dataset": True}
    done = run(tiny, tmp_path / "run", eval_strategy="steps", eval_steps=3, **sets)
    files = {path.name for path in (done / "bdpo").glob("*.parquet")}
    assert files == {
        "reference_scores.parquet",
        "reference_scores.eval.parquet",
        "reference_scores.train.parquet",
    }


def test_evaluation_alone(tiny, tmp_path, capfd):
    only = {"do_train": False, "do_eval": True, "eval_dataset": "eval", "dataset": None}
    model = str(tiny / "model")
    done = run(tiny, tmp_path / "run", **only, ref_model=model)
    assert f"`ref_model` {model}" in capfd.readouterr().out.replace("\n", "")
    results = json.loads((done / "eval_results.json").read_text())
    assert results["eval_rewards/margins"] == pytest.approx(0, abs=1e-4)
    assert results["eval_bdpo/imbalance"] > 0
    done = run(tiny, tmp_path / "self", **only)
    assert "the model that is evaluated" in capfd.readouterr().out
    assert "eval_rewards/margins" not in json.loads((done / "eval_results.json").read_text())


def test_a_run_whose_template_writes_the_date_goes_on_the_next_day(
    tiny, tmp_path, capfd, monkeypatch
):
    """By the tokenizer's own template, which LLaMA-Factory parses where none is named."""
    model = tmp_path / "model"
    shutil.copytree(tiny / "model", model)
    tokenizer = AutoTokenizer.from_pretrained(model)
    head = "<|im_start|>system\nToday is {{ strftime_now('%d %b %Y') }}.<|im_end|>\n"
    tokenizer.chat_template = head + tokenizer.chat_template
    tokenizer.save_pretrained(model)
    for day in (30, 29):
        now = staticmethod(lambda day=day: datetime(2026, 11, day))
        clock = type("Clock", (datetime,), {"now": now})
        monkeypatch.setattr("transformers.utils.chat_template_utils.datetime", clock)
        done = run(
            tiny,
            tmp_path / "run",
            model_name_or_path=str(model),
            template=None,
            save_strategy="steps",
            save_steps=1,
            max_steps=1 if day == 30 else 2,
            resume_from_checkpoint=None if day == 30 else str(tmp_path / "run/checkpoint-1"),
        )
    out = " ".join(capfd.readouterr().out.replace("│", " ").split())
    assert "30 Nov 2026 where the checkpoint was trained, 29 Nov 2026 here" in out
    assert len(curve(done, "loss")) == 2


def test_llama_factory_writes_a_date_of_its_own_where_rows_have_tools():
    from llamafactory.data.template import TEMPLATES

    from bdpo_plugin.hosts.llamafactory.tokenised import written_dates

    template = TEMPLATES["llama3"]
    dates = TemplateDates.of(None, written_dates(template))
    (system,) = template.format_tools.apply(content='[{"name": "f", "parameters": {}}]')
    today = datetime.now().strftime("%d %b %Y")
    assert today in system
    assert dates.without(system) == system.replace(today, "<date>")
    assert written_dates(TEMPLATES["chatml"]) == ()
