"""Every cross-field rule: the combination it refuses, and what the message names."""

from __future__ import annotations

import pytest

from pause_megatron.config import rules
from pause_megatron.config.load import load
from pause_megatron.config.objective_rules import requests
from pause_megatron.data.windows.pause import PausePlan
from pause_megatron.errors import ConfigError

# rule -> overrides that break it, and what the message must say
BROKEN = {
    "heads_divide_hidden": (
        ["model.heads=3"],
        "or a model.head_dim; got model.hidden=128 (preset tiny), model.heads=3 (command line)",
    ),
    "kv_heads_divide_heads": (["model.kv_heads=3"], "model.heads to be a multiple of model.kv_heads"),
    "tensor_divides_the_model": (["parallel.tensor=3"], "model.heads to be a multiple of parallel.tensor"),
    "biases_come_together": (["model.proj_bias=true"], "model.qkv_bias=true with model.proj_bias; got"),
    "a_family_has_the_options": (
        ["model.preset=qwen3-0.6b", "model.mlp_bias=true"],
        "the options of one family (Llama, Qwen2, Mistral, Qwen3, OLMo 2); got model.head_dim=128 (preset "
        "qwen3-0.6b), model.qk_norm=head (preset qwen3-0.6b), model.norm=pre (default), ",
    ),
    "rope_scaling_is_whole": (
        ["model.rope_scaling=yarn", "model.rope_factor=4"],
        "model.rope_original_length with yarn; got model.rope_scaling=yarn (command line), "
        "model.rope_original_length=None (default)",
    ),
    "options_need_torch_attention": (
        ["model.preset=olmo2-1b", "model.attention=te"],
        "expected model.attention=sdpa with model.qk_norm, model.norm; got model.attention=te (command line), "
        "model.qk_norm=whole (preset olmo2-1b), model.norm=post (preset olmo2-1b)",
    ),
    "sliding_layers_exist": (
        ["model.sliding_window=64", "model.sliding_from=4"],
        "which is below model.layers; got model.sliding_window=64 (command line), model.sliding_from=4 (command line), "
        "model.layers=4 (preset tiny)",
    ),
    "looped_layers_exist": (
        ["model.loops=2", "model.loop_layers=1..4"],
        "expected null, or a range LOW..HIGH within 0..3; got model.loop_layers=1..4 (command line), model.layers=4",
    ),
    "sequence_needs_tensor": (["parallel.sequence=true"], "parallel.tensor > 1 with parallel.sequence"),
    "tensor_divides_the_sequence": (
        ["parallel.sequence=true", "parallel.tensor=2", "data.sequence_length=63"],
        "data.sequence_length to be a multiple of parallel.tensor",
    ),
    "micro_divides_global": (["batch.micro_size=5"], "batch.global_size to be a multiple of batch.micro_size"),
    "steps_and_tokens_agree": (["train.steps=1", "train.tokens=1e9"], "only one of train.steps and train.tokens"),
    "warmup_ends": (["train.steps=10", "optim.warmup_steps=10"], "optim.warmup_steps < train.steps"),
    "placement_is_known": (["pause.placement=unifrom"], "Did you mean 'uniform'?"),
    "pauses_fit_the_window": (["pause.placement=bernoulli"], "pause.window=trim with bernoulli"),
    "objective_is_known": (["objective=anytme"], "Did you mean 'anytime'?"),
    "objective_uses_its_keys": (
        ["objective.stop_rate=0.3", "objective=anytime"],
        "objective.name=cyb_variational with objective.stop_rate",
    ),
    "token_weights_have_a_source": (
        ["objective.token_weights=side"],
        "a name in data.side with objective.token_weights=side",
    ),
    "requests_are_logits": (
        ["objective=cyb_budget", "pause.softmax=exclude"],
        "pause.softmax=keep, whose pause logit is the request",
    ),
    "runs_have_pauses": (["objective=cyb_anytime", "pause.placement=every", "pause.rate=0"], "pause.rate > 0 with cyb"),
    "steps_see_no_later_pause": (
        ["task.name=gsm8k", "objective=anytime", "finetune.prefix_attention=bidirectional", "finetune.pauses=4"],
        "a causal prefix with it",
    ),
    "patterns_are_used": (
        ["pause.pattern=(a", "pause.placement=after"],
        "a regular expression (missing ), unterminated subpattern at position 0); got pause.pattern=(a (command line)",
    ),
    "scores_need_a_side_array": (
        ["pause.placement=scored"],
        "data.side with scored; got pause.placement=scored (command line), data.side=None (default)",
    ),
    "side_arrays_are_used": (
        ["data.side=ppl"],
        "with data.side; got data.side=ppl (command line), pause.placement=uniform (default), "
        "objective.token_weights=None (default)",
    ),
    "split_has_shares": (
        ["data.split=1,0,0"],
        "a validation share > 0 in data.split, corpora in data.valid_prefix, or",
    ),
    "all_of_the_corpus_trains": (
        ["data.valid_prefix=v", "data.split=99,1,0"],
        "data.split=1,0,0 (or none) with data.valid_prefix: the whole of data.prefix trains",
    ),
    "text_has_one_source": (
        ["data.prefix=a", "data.source=b", "data.tokenizer=t", "validation.every=0"],
        "data.prefix (a prepared corpus) or data.source (a stream), not both",
    ),
    "a_stream_needs_a_tokenizer": (
        ["data.source=hf:allenai/c4", "validation.every=0"],
        "the path of a tokenizer in data.tokenizer with data.source",
    ),
    "a_stream_holds_nothing_out": (
        ["data.source=hf:allenai/c4", "data.tokenizer=t"],
        "a prepared corpus in data.valid_prefix, or validation.every=0, with data.source",
    ),
    "finetune_pauses_can_be_counted": (["finetune.pauses=50..0"], "a range LOW..HIGH such as 0..50; got"),
    "epochs_are_of_a_task": (["finetune.epochs=2"], "task.name with finetune.epochs"),
    "hints_have_one_place": (
        ["finetune.pause_targets=true", "finetune.auxiliary_heads=true", "finetune.pauses=9", "task.name=a:b"],
        "only one of finetune.pause_targets and finetune.auxiliary_heads",
    ),
    "pause_targets_need_appended_pauses": (
        ["finetune.pause_targets=true", "finetune.pauses=1..9", "task.name=a:b"],
        "at least 2 finetune.pauses with finetune.pause_targets (the last one predicts the answer); got",
    ),
    "auxiliary_heads_are_trained": (
        ["finetune.auxiliary_heads=true", "train.only=pause_rows", "task.name=a:b"],
        "train.only=null with finetune.auxiliary_heads",
    ),
    "answers_are_of_a_task": (
        ["finetune.answer_placement=uniform"],
        "task.name with finetune.answer_placement; pretraining places pauses by pause.placement; got",
    ),
    "answer_placement_is_known": (
        ["finetune.answer_placement=unifrom", "task.name=a:b"],
        "every or 'module:attribute'. Did you mean 'uniform'?; got finetune.answer_placement=unifrom (command line)",
    ),
    "scores_of_answers_are_used": (
        ["task.scores=f", "task.name=a:b"],
        "finetune.answer_placement=scored or a policy of yours with task.scores; got task.scores=f (command line), "
        "finetune.answer_placement=None (default)",
    ),
    "adapters_are_trained": (
        ["lora.rank=4", "lora.layers=0..1"],
        "expected train.only=lora with keys of lora; got lora.rank=4 (command line), lora.layers=0..1 (command line)",
    ),
    "adapters_fit_the_model": (
        ["train.only=lora", "lora.targets=qkv,o_proj"],
        "expected one or more of qkv, proj, fc1, fc2, each once; got lora.targets=",
    ),
    "adapters_need_torch_layers": (
        ["train.only=lora", "model.attention=te"],
        "model.attention=sdpa with train.only=lora",
    ),
    "shared_positions_need_torch_attention": (
        ["pause.positions=shared", "model.attention=te"],
        "model.attention=sdpa with pause.positions=shared",
    ),
    "masks_need_torch_attention": (
        ["task.name=gsm8k", "model.attention=te"],
        "model.attention=sdpa with packed examples or a bidirectional prefix",
    ),
    "prefixes_fit_the_sliding_window": (
        ["task.name=gsm8k", "finetune.prefix_attention=bidirectional", "model.sliding_window=64"],
        "data.sequence_length up to model.sliding_window with a bidirectional prefix, or a causal one; got "
        "finetune.prefix_attention=bidirectional (command line), model.sliding_window=64 (command line)",
    ),
    "intra_document_masking_needs_torch_attention": (
        ["data.intra_document_masking=true", "model.attention=te"],
        "model.attention=sdpa with data.intra_document_masking=true",
    ),
    "an_extension_adds_steps": (
        ["train.steps=100", "train.extended_from=100"],
        "expected train.steps > train.extended_from (the step at which the finished run ended); got train.steps=100",
    ),
    "run_dir_is_named": (["run.dir=' '"], "the name of a folder"),
}


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["finetune.auxiliary_heads=true"], "task.name with finetune.auxiliary_heads"),
        (
            ["finetune.pause_targets=true", "finetune.pauses=9", "finetune.location=prepend", "task.name=a:b"],
            "finetune.location=append with finetune.pause_targets",
        ),
    ],
)
def test_hints_need_a_task_and_appended_pauses(overrides, expected):
    with pytest.raises(ConfigError) as caught:
        load(overrides=overrides)
    assert expected in str(caught.value)


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["finetune.answer_placement=every", "task.scores=f"], "=scored or a policy of yours with task.scores; got"),
        (["finetune.answer_placement=scored"], "`pause-megatron score --task` in task.scores with scored; got"),
        (["finetune.answer_placement=after", "pause.pattern=a["], "a regular expression (unterminated character set"),
        (["finetune.answer_placement=every", "pause.pattern=x"], "after or before with pause.pattern; got"),
        (["finetune.answer_placement=isolated", "finetune.answer_rate=1.5"], "answer_rate <= pause.run with isolated"),
        (
            ["finetune.answer_placement=bernoulli", "finetune.answer_rate=1.5"],
            "answer_rate <= pause.run with bernoulli",
        ),
        (["finetune.answer_placement=every", "finetune.answer_rate=0.5"], "and not every, with finetune.answer_rate"),
        (["objective=anytime"], "pauses after the prompt or within the answer with anytime"),
        (["objective=anytime", "finetune.pauses=3", "finetune.location=prepend"], "within the answer with anytime"),
        (["finetune.answer_rate=0.5"], "finetune.answer_placement, and not every, with finetune.answer_rate; got"),
    ],
)
def test_pauses_within_answers_fit_their_policy(overrides, expected):
    with pytest.raises(ConfigError) as caught:
        load(overrides=["task.name=gsm8k", *overrides])
    assert expected in str(caught.value) and "\n" not in str(caught.value)
    loaded = load(overrides=["task.name=gsm8k", "finetune.answer_placement=before", "pause.pattern=[0-9]"])
    assert PausePlan.of(loaded.pause, 64).pattern is None  # the pretraining's own placement does not use it


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (
            ["model.head_dim=33"],
            "an even head size, for rotary embedding rotates pairs of channels; got model.head_dim=33",
        ),
        (["model.hidden=132"], "an even head size (model.hidden / model.heads)"),
        (
            ["model.heads=24", "model.kv_heads=6", "model.head_dim=8", "parallel.tensor=4"],
            "multiple or a divisor of parallel",
        ),
        (
            ["model.heads=5", "model.kv_heads=1", "model.head_dim=2", "model.ffn=65", "parallel.tensor=5"],
            "the rows of queries, keys and values to be a multiple of parallel.tensor; got model.kv_heads=1",
        ),
        (
            ["model.family=qwen2"],
            "options that Qwen2 has, or model.family=null; got model.family=qwen2 (command line), model.qkv_bias",
        ),
        (["model.preset=mistral-7b", "model.family=llama"], "options that Llama has"),
        (["model.preset=qwen3-0.6b", "model.norm=post"], "the options of one family"),
        (["model.rope_factor=2"], "a model.rope_scaling with its factor or original length; got"),
        (["model.preset=llama-3.2-1b", "model.rope_low_freq=4"], "model.rope_low_freq below model.rope_high_freq; got"),
        (
            ["model.rope_scaling=yarn", "model.rope_original_length=64", "model.rope_beta_fast=1"],
            "model.rope_beta_slow below model.rope_beta_fast; got model.rope_beta_slow=1.0 (default)",
        ),
        (["model.sliding_from=1"], "a model.sliding_window with model.sliding_from"),
    ],
)
def test_options_of_a_model_that_do_not_go_together_are_refused(overrides, expected):
    with pytest.raises(ConfigError) as caught:
        load(overrides=overrides)
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("lora.targets=[]", "one or more of qkv, proj, fc1, fc2"),
        ("lora.targets=qkv qkv", "each once"),
        ("lora.rank=129", "a lora.rank up to the width of the adapted matrices; got lora.rank=129"),
        ("lora.rank=0", "lora.rank"),
        ("lora.layers=1..9", "null, or a range LOW..HIGH within 0.."),
        ("lora.layers=1..0", "null, or a range LOW..HIGH within 0.."),
        ("lora.layers=all", "null, or a range LOW..HIGH within 0.."),
    ],
)
def test_adapters_fit_the_model(override, expected):
    with pytest.raises(ConfigError) as caught:
        load(overrides=["train.only=lora", override])
    assert expected in str(caught.value)
    config = load(overrides=["train.only=lora", "lora.targets=qkv,fc2", "lora.layers=0..1", "lora.rank=128"])
    assert config.lora.targets == ("qkv", "fc2")


def test_every_rule_has_a_case():
    assert {rule.__name__ for rule in rules.RULES} == set(BROKEN)


@pytest.mark.parametrize("name", BROKEN)
def test_broken_rules_say_what_was_expected_and_given(name):
    overrides, message = BROKEN[name]
    with pytest.raises(ConfigError) as caught:
        load(overrides=overrides)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["pause.placement=bernoulli"], "pause.window=trim with bernoulli"),
        (
            ["pause.rate=0.99", "data.sequence_length=8"],
            "at least 2 text tokens in a window of 8 + 1 tokens with 8 pauses; got pause.rate=0.99",
        ),
        (["pause.placement=isolated", "pause.rate=0.6"], "no more pauses (1229) than text tokens (820)"),
    ],
)
def test_pauses_that_do_not_fit_a_window_are_refused(overrides, message):
    with pytest.raises(ConfigError) as caught:
        load(overrides=overrides)
    assert message in str(caught.value)


def test_all_broken_rules_are_reported_together():
    with pytest.raises(ConfigError) as caught:
        load(overrides=["model.heads=3", "batch.micro_size=5"])
    assert str(caught.value).count("expected") == 2


@pytest.mark.parametrize(
    "overrides",
    [
        ["pause.placement=my.module:policy"],
        ["pause.placement=bernoulli", "pause.window=trim"],
        ["pause.placement=isolated", "pause.rate=0.5"],
        ["data.split=1,0,0", "validation.every=0"],
        ["data.split=1,0,0", "data.valid_prefix=v"],
        ["train.steps=10", "optim.warmup_steps=8", "optim.schedule=wsd"],
        ["train.extended_from=100", "train.steps=110", "optim.warmup_steps=9"],
        ["train.extended_from=100", "train.steps=110", "optim.warmup_steps=50", "optim.schedule=constant"],
        ["parallel.tensor=4", "parallel.sequence=true", "model.preset=1b"],
        ["parallel.tensor=4", "model.kv_heads=2"],
        ["model.preset=mistral-7b", "model.sliding_window=null"],
        ["model.preset=llama-3.2-1b", "model.rope_scaling=null"],
        ["model.preset=llama-3.2-1b", "model.rope_scaling=linear", "model.rope_factor=2"],
        ["model.preset=qwen3-0.6b", "model.heads=4"],
        ["task.name=gsm8k", "finetune.pauses=0..50", "finetune.epochs=0.5"],
        ["task.name=gsm8k", "finetune.batching=padded", "model.attention=te"],
        ["task.name=gsm8k", "finetune.answer_placement=with_replacement", "finetune.answer_rate=2"],
        ["task.name=gsm8k", "finetune.answer_placement=every", "pause.run=2"],
        ["task.name=gsm8k", "finetune.answer_placement=isolated", "finetune.answer_rate=2", "pause.run=2"],
        ["task.name=gsm8k", "finetune.answer_placement=every", "objective=anytime", "finetune.location=prepend"],
        ["task.name=gsm8k", "finetune.answer_placement=scored", "task.scores=f", "pause.run=2"],
        ["task.name=gsm8k", "finetune.answer_placement=a:b", "task.scores=f"],
    ],
)
def test_combinations_that_are_fine(overrides):
    load(overrides=overrides)


@pytest.mark.parametrize("split", ["99,1", "a,b,c", "0,1,0", "1,-1,0", "inf,1,0", ""])
def test_split_needs_three_shares(split):
    with pytest.raises(ConfigError, match="three shares"):
        load(overrides=[f"data.split='{split}'"])


def test_wsd_needs_room_for_its_decay():
    with pytest.raises(ConfigError, match="warm-up and decay"):
        load(overrides=["train.steps=10", "optim.warmup_steps=9", "optim.schedule=wsd"])


def test_missing_sizes_are_named():
    with pytest.raises(
        ConfigError, match=r"model\.layers, model\.heads: expected a value because model\.preset is null"
    ):
        load(overrides=["model.preset=null", "model.hidden=64"])
    model = load(overrides=["model.preset=null", "model.hidden=64", "model.layers=2", "model.heads=4"]).model
    assert (model.ffn, model.kv_heads, model.tied) == (192, 4, False)


def test_with_corpora_to_validate_on_all_of_data_prefix_trains():
    assert load().data.split == "99,1,0"
    assert load(overrides=["data.valid_prefix=v w"]).data.split == "1,0,0"
    config = load(recipe="tiny-pause", overrides=["data.valid_prefix=0.3 v 0.7 w"])
    assert (config.data.split, config.data.valid_prefix) == ("1,0,0", ("0.3", "v", "0.7", "w"))


def test_a_module_may_be_named_like_catch_your_breath():
    keys = ["objective=cyb_of_mine:Loss", "pause.softmax=exclude", "pause.rate=0"]
    assert requests(load(overrides=keys)) is None
