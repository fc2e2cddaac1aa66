"""What the trainer does beside the loss: metrics, files, reuse, memory, refusals, data."""

import dataclasses
import gc
import re
import weakref

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from running import history, pairs, scores, sharp_model, trainer, weights
from transformers import GPT2Config, GPT2LMHeadModel, T5Config, T5ForConditionalGeneration
from trl import DPOConfig, DPOTrainer

from bdpo_plugin import BalanceWeights, BDPOConfig, BDPOError, BDPOTrainer, bdpo_loss
from bdpo_plugin.demo.tiny import build_tokenizer
from bdpo_plugin.hosts.trl.limits import check_arguments
from bdpo_plugin.reference import scoring
from bdpo_plugin.training.score_columns import batch_scores

METRICS = (
    "mi_chosen",
    "mi_rejected",
    "imbalance",
    "chosen_share",
    "weight_chosen",
    "weight_rejected",
    "scale",
)


@pytest.fixture
def scored_rows(monkeypatch):
    """Counts the sequences that the reference really runs on in its pass; not those of a few
    reused scores that are computed again, each in a row that is not packed."""
    count = []
    real = scoring._queue

    def counting(jobs, *args, **options):
        if options["may_pack"]:
            count.append(len(jobs))
        return real(jobs, *args, **options)

    monkeypatch.setattr(scoring, "_queue", counting)
    return count


def test_metrics_files_and_evaluation(tmp_path, capsys):
    made = trainer(
        output_dir=tmp_path,
        evaluation={"small": pairs(6, seed=1), "other": pairs(4, seed=2)},
        eval_strategy="steps",
        eval_steps=2,
    )
    done = made.train()
    assert 0.01 < done.metrics["train_peak_memory_gib"] < 100
    assert history(made, "train_peak_memory_gib") == [done.metrics["train_peak_memory_gib"]]
    for prefix in ("", "eval_"):
        for name in METRICS:
            assert history(made, f"{prefix}bdpo/{name}"), (prefix, name)
        assert history(made, f"{prefix}rewards/margins")

    saved = scores(tmp_path)
    assert list(saved) == [
        "row",
        "chosen_tokens",
        "rejected_tokens",
        "ref_chosen_logps",
        "ref_rejected_logps",
        "mi_chosen",
        "mi_rejected",
        "weight_chosen",
        "weight_rejected",
        "scale",
    ]
    assert saved["row"] == list(range(24))
    assert saved["chosen_tokens"] == [len(ids) for ids in made.train_dataset["chosen_ids"]]
    assert len(scores(tmp_path, "reference_scores.small.parquet")["row"]) == 6
    assert len(scores(tmp_path, "reference_scores.other.parquet")["row"]) == 4

    out = capsys.readouterr().out
    for words in (
        "adapter off",
        "<|im_start|>user",
        "100.0% of the prompts begin and end so",
        "softmax, alpha 1.5",
        "24: 24 scored now, 0 reused",
        "(5/50/95 %)",
        "below 0",
        "MI chosen > rejected",
        "mean scale",
    ):
        assert words in out

    extra = made.evaluate(pairs(5, seed=3))
    assert extra["eval_bdpo/scale"] > 0


def test_pairs_of_similar_length_share_a_batch(tmp_path):
    options = {"train_sampling_strategy": "group_by_length"}
    made = trainer(output_dir=tmp_path, dataset=pairs(64), **options)
    rows = made.train_dataset
    sides = zip(rows["chosen_ids"], rows["rejected_ids"], strict=True)
    longest = [max(map(len, two)) for two in sides]
    lengths = [len(p) + n for p, n in zip(rows["prompt_ids"], longest, strict=True)]
    assert rows["bdpo_length"] == lengths

    def padding(order):
        batches = [[lengths[i] for i in order[n : n + 4]] for n in range(0, 64, 4)]
        return sum(len(b) * max(b) - sum(b) for b in batches)

    order = list(made._get_train_sampler())
    assert sorted(order) == list(range(64))
    assert padding(order) < 0.6 * padding(range(64))
    assert made.train().global_step == 4


def test_metrics_are_means_over_the_pairs(tmp_path):
    made = trainer(output_dir=tmp_path, per_device_train_batch_size=24, max_steps=1)
    made.train()
    saved = {name: torch.tensor(column) for name, column in scores(tmp_path).items()}
    difference = saved["mi_chosen"] - saved["mi_rejected"]
    for name, wanted in {
        "mi_chosen": saved["mi_chosen"].mean(),
        "imbalance": difference.abs().mean(),
        "chosen_share": (difference > 0).float().mean(),
        "weight_rejected": saved["weight_rejected"].mean(),
        "scale": saved["scale"].mean(),
    }.items():
        assert history(made, f"bdpo/{name}") == [pytest.approx(float(wanted), abs=1e-5)]


def test_another_alpha_seed_rate_or_rank_scores_nothing_again(tmp_path, scored_rows, capsys):
    trainer(output_dir=tmp_path / "first")
    assert sum(scored_rows) > 0
    scored_rows.clear()
    for name, options in {
        "alpha": {"bdpo_alpha": 3.0, "bdpo_weighting": "power", "bdpo_mi_normalize": False},
        "seed": {"seed": 7, "learning_rate": 3e-4},
        "rank": {"lora": LoraConfig(r=8, target_modules=["q_proj"], modules_to_save=["lm_head"])},
        "full": {"lora": False},
    }.items():
        capsys.readouterr()
        trainer(output_dir=tmp_path / name, **options)
        assert "24: 0 scored now, 24 reused" in capsys.readouterr().out, name
        assert not scored_rows, name
        assert (
            scores(tmp_path / name)["ref_chosen_logps"]
            == (scores(tmp_path / "first")["ref_chosen_logps"])
        )


def test_changed_data_scores_only_what_changed(tmp_path, scored_rows):
    rows = pairs().to_list()
    trainer(output_dir=tmp_path / "first", dataset=Dataset.from_list(rows))
    scored_rows.clear()
    rows[3]["chosen"][0]["content"] += " And more."
    rows = rows[::-1]
    trainer(output_dir=tmp_path / "second", dataset=Dataset.from_list(rows))
    assert sum(scored_rows) == 2  # one response, after its query and after the null prompt


def test_another_reference_or_null_prompt_is_scored_anew(tmp_path, scored_rows):
    trainer(output_dir=tmp_path / "first")
    first = sum(scored_rows)
    scored_rows.clear()
    trainer(output_dir=tmp_path / "model", model=sharp_model(seed=1))
    assert sum(scored_rows) == first
    scored_rows.clear()
    trainer(output_dir=tmp_path / "null", bdpo_null_prompt="<|im_start|>user\n")
    assert 0 < sum(scored_rows) < first  # what follows the queries is known already


def test_a_run_that_breaks_in_the_pass_goes_on_where_it_was(tmp_path, scored_rows, monkeypatch):
    trainer(output_dir=tmp_path / "whole", bdpo_score_tokens=400)
    whole = sum(scored_rows)
    wanted = scores(tmp_path / "whole")
    counting = scoring._queue

    def failing(jobs, *args, **options):
        if len(scored_rows) == 5:
            raise KeyboardInterrupt
        return counting(jobs, *args, **options)

    scored_rows.clear()
    monkeypatch.setattr(scoring, "_queue", failing)
    options = {"bdpo_score_tokens": 400, "bdpo_cache_dir": str(tmp_path / "new")}
    with pytest.raises(KeyboardInterrupt):
        trainer(output_dir=tmp_path / "broken", **options)
    done = sum(scored_rows)
    monkeypatch.setattr(scoring, "_queue", counting)
    scored_rows.clear()
    trainer(output_dir=tmp_path / "again", **options)
    assert done > 0
    assert sum(scored_rows) == whole - done
    for name, column in scores(tmp_path / "again").items():
        assert column == pytest.approx(wanted[name], abs=1e-4)


def test_a_separate_reference_model_is_let_go_after_the_pass(tmp_path):
    reference = sharp_model(seed=5)
    alive = weakref.ref(reference)
    made = trainer(output_dir=tmp_path, lora=False, ref_model=reference)
    del reference
    gc.collect()
    assert alive() is None
    assert made.ref_model is None
    made.train()
    assert history(made, "rewards/chosen")[0] != 0  # the policy is another model


def test_resume_gives_the_same_run(tmp_path):
    options = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3}
    whole = trainer(output_dir=tmp_path / "whole", **options)
    whole.train()
    resumed = trainer(output_dir=tmp_path / "whole", **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    assert history(resumed, "loss") == pytest.approx(history(whole, "loss"), abs=1e-6)
    wanted = weights(whole)
    for name, parameter in weights(resumed).items():
        torch.testing.assert_close(parameter, wanted[name], rtol=0, atol=1e-6)


def test_an_adapter_to_go_on_from_is_part_of_the_reference(tmp_path, capsys):
    from peft import get_peft_model

    torch.manual_seed(1)
    config = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    adapted = get_peft_model(sharp_model(), config)
    made = trainer(output_dir=tmp_path, model=adapted, lora=False)
    out = re.sub(r"[│\s]+", " ", capsys.readouterr().out)
    assert "with a frozen copy of the adapter given" in out
    assert made.model.active_adapter == "default"
    made.train()
    assert history(made, "rewards/chosen")[0] == pytest.approx(0, abs=1e-5)
    trainer(output_dir=tmp_path / "base")
    assert scores(tmp_path)["ref_chosen_logps"] != scores(tmp_path / "base")["ref_chosen_logps"]


def test_a_stream_is_scored_step_by_step(tmp_path, capsys):
    stream = pairs().to_iterable_dataset()
    with pytest.raises(BDPOError, match="bdpo_precompute: false"):
        trainer(output_dir=tmp_path / "refused", dataset=stream)
    made = trainer(output_dir=tmp_path / "stream", dataset=stream, bdpo_precompute=False)
    made.train()
    assert "in each step" in capsys.readouterr().out
    assert len(history(made, "bdpo/scale")) == 4


def test_a_callable_may_weigh_the_pairs(tmp_path, capsys):
    seen = []

    def shuffled(mi_chosen, mi_rejected):
        seen.append(mi_chosen)
        order = torch.arange(len(mi_chosen)).flip(0)
        weight = 1 + 0.5 * torch.tanh(mi_rejected - mi_chosen)[order]
        return BalanceWeights(weight, 2 - weight, torch.ones_like(weight))

    trainer(output_dir=tmp_path, weigh=shuffled)
    assert len(seen) == 1
    assert len(seen[0]) == 24  # the whole dataset at once
    assert "given as a callable" in capsys.readouterr().out
    saved = scores(tmp_path)
    wanted = shuffled(torch.tensor(saved["mi_chosen"]), torch.tensor(saved["mi_rejected"]))
    assert saved["weight_chosen"] == pytest.approx(wanted.chosen.tolist())

    with pytest.raises(BDPOError, match=r"three finite tensors of the shape .*\(24,\)"):
        trainer(
            output_dir=tmp_path,
            weigh=lambda w, l: BalanceWeights(w[:1], l, l),  # noqa: E741
        )


def test_a_callable_may_ask_for_columns_and_lengths(tmp_path):
    seen = {}

    def by_kind(mi_chosen, mi_rejected, *, kind, chosen_tokens, rejected_tokens):
        seen.update(kind=kind, chosen=chosen_tokens, rejected=rejected_tokens)
        ones = torch.ones_like(mi_chosen)
        return BalanceWeights(ones, ones, 1 + torch.tensor(kind))

    kinds = [i % 3 for i in range(24)]
    trainer(output_dir=tmp_path, weigh=by_kind, dataset=pairs().add_column("kind", kinds))
    saved = scores(tmp_path)
    assert seen["kind"] == kinds
    assert saved["scale"] == [1 + kind for kind in kinds]
    for side in ("chosen", "rejected"):
        assert seen[side].tolist() == saved[f"{side}_tokens"]
    with pytest.raises(BDPOError, match=r"asks for kind, which the train data does not have"):
        trainer(output_dir=tmp_path / "without", weigh=by_kind)
    with pytest.raises(BDPOError, match=r"asks for kind: .*`bdpo_precompute: true`"):
        trainer(output_dir=tmp_path / "step", weigh=by_kind, bdpo_precompute=False)


def test_a_subclass_may_have_another_loss_of_the_pairs(tmp_path):
    class Twice(BDPOTrainer):
        @staticmethod
        def pair_loss(*logps_and_weights, **options):
            return 2 * bdpo_loss(*logps_and_weights, **options)

    losses = []
    for cls in (BDPOTrainer, Twice):
        made = trainer(cls, output_dir=tmp_path / cls.__name__, max_steps=1)
        made.train()
        losses += history(made, "loss")
    assert losses[1] == pytest.approx(2 * losses[0])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss_type": ["apo_zero"]}, r"`loss_type: apo_zero`.*sigmoid, hinge, ipo, robust, sft"),
        ({"loss_type": ["sft"]}, "no preference loss to balance"),
        ({"use_weighting": True}, "`use_weighting: True`"),
        ({"f_divergence_type": "js_divergence"}, "`f_divergence_type: js_divergence`"),
        ({"ld_alpha": 0.5}, "`ld_alpha: 0.5`"),
        ({"padding_free": True}, "`padding_free: True`"),
        ({"precompute_ref_batch_size": 4}, "`precompute_ref_batch_size: 4`.*bdpo_score_tokens"),
        ({"label_smoothing": 0.1}, "`label_smoothing: 0.1` has no effect.*robust"),
        (
            {"label_smoothing": 0.6, "loss_type": ["robust"]},
            r"`label_smoothing: 0.6`.*in \[0, 0.5\)",
        ),
        ({"bdpo_alpha": -1}, r"`bdpo_alpha: -1`.*finite number >= 0"),
        (
            {"precompute_ref_log_probs": True, "bdpo_precompute": False},
            "contradicts `bdpo_precompute: False`",
        ),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_what_cannot_be_honoured_is_refused(tmp_path, options, message):
    with pytest.raises(BDPOError, match=message):
        trainer(output_dir=tmp_path, **options)


def test_ligers_kernels_run_in_the_layers_and_never_as_the_loss(tmp_path) -> None:
    import trl

    options = {"output_dir": tmp_path, "use_liger_kernel": True, "max_steps": 1}
    if trl.__version__ == "1.9.0":  # there they are the loss
        with pytest.raises(BDPOError, match="`use_liger_kernel: True`"):
            trainer(**options)
        return
    with pytest.warns(FutureWarning, match="use_liger_kernel"):
        made = trainer(**options)
    assert made.args.liger_kernel_config["fused_linear_cross_entropy"] is False


def test_plain_arguments_are_refused(tmp_path):
    with pytest.raises(BDPOError, match="needs `args` to be a"):
        BDPOTrainer("model", args=DPOConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False))


def test_a_batch_without_scores_is_refused(tmp_path):
    made = trainer(output_dir=tmp_path)
    rows = [made.train_dataset[i] for i in range(4)]
    for row in rows:
        del row["bdpo_scale"]
    with pytest.raises(BDPOError, match="The batch has no bdpo_scale"):
        made.compute_loss(made.model, made.data_collator(rows))


def test_vision_data_is_refused(tmp_path):
    rows = pairs(4)
    with pytest.raises(BDPOError, match=r"vision dataset.*Remove the column images"):
        trainer(output_dir=tmp_path, dataset=rows.add_column("images", [None] * 4))


def test_adapters_of_a_reference_model_count(tmp_path, scored_rows):
    from peft import get_peft_model

    trainer(output_dir=tmp_path / "base")
    logps = [scores(tmp_path / "base")["ref_chosen_logps"]]
    for seed in (1, 2):
        scored_rows.clear()
        torch.manual_seed(seed)
        config = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
        reference = get_peft_model(sharp_model(), config)
        trainer(output_dir=tmp_path / str(seed), lora=False, ref_model=reference)
        assert scored_rows
        logps.append(scores(tmp_path / str(seed))["ref_chosen_logps"])
    assert logps[0] != logps[1] != logps[2] != logps[0]


def test_a_fresh_adapter_given_is_the_base_model(tmp_path, scored_rows):
    from peft import get_peft_model

    trainer(output_dir=tmp_path / "base")
    scored_rows.clear()
    fresh = get_peft_model(sharp_model(), LoraConfig(r=8, target_modules=["q_proj"]))
    trainer(output_dir=tmp_path / "fresh", model=fresh, lora=False)
    assert not scored_rows


def test_sequences_that_a_rotary_embedding_reads_by_their_batch_are_told(tmp_path, capsys):
    dynamic = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    for longest, words in ((16, "24 of 24 training pairs have more than 16 tokens"), (512, "")):
        model = sharp_model(rope_parameters=dynamic, max_position_embeddings=longest)
        trainer(output_dir=tmp_path / str(longest), model=model)
        out = " ".join(
            line.split("│")[-2].strip()
            for line in capsys.readouterr().out.split("\n")
            if "│" in line
        )
        assert words in out
        assert ("rotary" in out) == bool(words)


def test_new_data_after_the_reference_was_let_go_is_refused(tmp_path):
    made = trainer(
        output_dir=tmp_path,
        lora=False,
        ref_model=sharp_model(seed=5),
        evaluation=pairs(4, seed=1),
    )
    with pytest.raises(BDPOError, match=r"eval data has no scores.*was released"):
        made.evaluate(pairs(4, seed=2))
    before = history(made, "eval_loss")
    assert made.evaluate()["eval_loss"] > 0
    assert made.evaluate(made.eval_dataset)["eval_loss"] > 0
    assert len(history(made, "eval_loss")) == len(before) + 2


def test_tools_may_be_written_as_json(tmp_path):
    rows = [{**row, "tools": "[]"} for row in pairs(4).to_list()]
    trainer(output_dir=tmp_path, dataset=Dataset.from_list(rows))


def test_scores_survive_a_host_that_casts_floats(tmp_path):
    made = trainer(output_dir=tmp_path)
    rows = [made.train_dataset[i] for i in range(4)]
    # what transformers does to a batch under DeepSpeed with bf16
    batch = {
        name: value.to(torch.bfloat16) if value.is_floating_point() else value
        for name, value in made.data_collator(rows).items()
    }
    for name, column in batch_scores(batch).items():
        assert column.tolist() == pytest.approx([row[name] for row in rows], rel=1e-6)


def test_an_evaluation_counts_the_tokens_up_to_it(tmp_path):
    """As TRL does, also where it falls between two logs."""
    told = []
    for cls, options in ((DPOTrainer, {}), (BDPOTrainer, {"bdpo_alpha": 0})):
        made = trainer(
            cls,
            tmp_path / cls.__name__,
            evaluation=pairs(4, seed=1),
            max_steps=6,
            logging_steps=4,
            logging_first_step=True,
            eval_strategy="steps",
            eval_steps=3,
            precompute_ref_log_probs=True,
            **options,
        )
        made.train()
        log = made.state.log_history
        told.append([(e["step"], e.get("num_tokens", e.get("eval_num_tokens"))) for e in log])
        accuracies = history(made, "rewards/margins")
        assert len(accuracies) == 2
    assert told[0] == told[1]
    assert [step for step, tokens in told[0] if tokens] == [1, 3, 4, 6]


def test_what_says_trls_defaults_is_never_refused(tmp_path):
    """Each argument with TRL's default, and with the value that changes nothing."""
    given = {
        field.name: field.default
        for field in dataclasses.fields(DPOConfig)
        if field.init and field.default is not dataclasses.MISSING
    }
    here = {"output_dir": str(tmp_path), "use_cpu": True, "bf16": False, "ld_alpha": 1.0}
    made = BDPOConfig(**given | here)
    assert check_arguments(made).alpha == 1.5


@pytest.mark.parametrize("model", ["no/such/model", "./not-here", "nowhere"])
def test_a_model_that_is_not_there_is_told(tmp_path, model):
    with pytest.raises(BDPOError, match=rf"`model: {model}` cannot be loaded: there is no such"):
        trainer(output_dir=tmp_path, model=model)


def test_an_encoder_decoder_model_is_refused(tmp_path):
    config = T5Config(vocab_size=100, d_model=8, d_ff=8, num_layers=1, num_heads=1, d_kv=8)
    model = T5ForConditionalGeneration(config)
    model.save_pretrained(tmp_path / "model")
    for given in (model, str(tmp_path / "model")):
        with pytest.raises(BDPOError, match=r"is an encoder-decoder model \(`model_type: t5`\)"):
            trainer(output_dir=tmp_path, model=given, lora=False)


ROWS = pairs(4, seed=1)
SAME = ROWS.to_list()[0]["chosen"]


@pytest.mark.parametrize(
    ("evaluation", "options", "words"),
    [
        (ROWS.to_iterable_dataset(), {}, "The eval data is a stream"),
        ({"a": ROWS, "b": ROWS.to_iterable_dataset()}, {}, "The b data is a stream"),
        (ROWS, {"bdpo_control": "shuffled:kind"}, "the eval data has no column `kind`, only"),
        ({"a": ROWS}, {"bdpo_control": "shuffled:bdpo_kind"}, "the train data has no column"),
        (
            {"a": ROWS, "b": ROWS.map(lambda _: {"chosen": SAME, "rejected": SAME})},
            {},
            "No pair of the b data can be trained on",
        ),
        (pairs(2, seed=1).map(lambda r: {"chosen": r["chosen"] * 9}), {}, "positions for"),
    ],
    ids=["stream", "named stream", "column", "reserved", "nothing left", "too long"],
)
def test_what_ends_a_run_after_the_pass_ends_it_before(
    tmp_path, scored_rows, evaluation, options, words
):
    dataset = pairs().add_column("kind", [0, 1] * 12).add_column("bdpo_kind", [0, 1] * 12)
    tokenizer, model = build_tokenizer(), None
    if words == "positions for":  # enough of them for the training data
        sizes = {"n_positions": 200, "n_embd": 32, "n_layer": 1, "n_head": 2}
        model = GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), **sizes))
        options = {"lora": False}
    with pytest.raises(BDPOError, match=words):
        trainer(
            output_dir=tmp_path,
            model=model,
            dataset=dataset,
            evaluation=evaluation,
            **options,
        )
    assert not scored_rows


@pytest.mark.parametrize("wanted", [True, False])
def test_first_steps_left_in_a_shell_are_told(tmp_path, capsys, monkeypatch, wanted):
    monkeypatch.setenv("BDPO_FIRST_STEPS", "2")
    if wanted:  # as `bdpo recipes check --run` sets it
        monkeypatch.setenv("BDPO_FIRST_STEPS_IN", str(tmp_path))
    made = trainer(output_dir=tmp_path)
    with pytest.raises(SystemExit) as ended:
        made.train()
    assert made.state.global_step == 2
    told = "`BDPO_FIRST_STEPS=2` is set in the environment: this run"
    out = re.sub(r"[│\s]+", " ", capsys.readouterr().out)
    if wanted:
        assert ended.value.code == 0
        assert told not in out
    else:
        assert f"{told} has ended after 2 steps, and no model is saved" in ended.value.code
        assert f"{told} will end after 2 steps" in out
