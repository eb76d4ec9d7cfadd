"""The lm-evaluation-harness adapter on a tiny model: hand-made requests, and whole evaluations."""

import dataclasses
import hashlib
import json
import socket
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ecmh_jax import Config, make_tuning, sample
from models.chat_template import encode_chats
from tests import tiny_checkpoints

lm_eval = pytest.importorskip("lm_eval", reason="needs pip install -e '.[lm_eval]'")

from lm_eval.api.instance import Instance  # noqa: E402
from lm_eval.api.registry import get_model  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402

from experiments import lm_eval_adapter  # noqa: E402
from experiments.lm_eval_adapter import PowerSampler, Request  # noqa: E402

CONTEXTS = ("hello there", "12 + 34 =", "what is it?")
SCHEDULE = {"max_new_tokens": 12, "num_stages": 3, "steps_per_stage": 3}
SETTINGS = {**SCHEDULE, "power": 2.0, "top_k": 20, "num_slots": "3", "seed": 5}


@pytest.fixture(scope="module", autouse=True)
def compiled_programs(tmp_path_factory):
    """Keeps compiled programs on disk for this file: its models compile the same few."""
    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = [getattr(jax.config, name) for name in names]
    for name, value in zip(names, (str(tmp_path_factory.mktemp("compiled")), 0.0), strict=True):
        jax.config.update(name, value)
    yield
    for name, value in zip(names, before, strict=True):
        jax.config.update(name, value)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    config = tiny_checkpoints.CONFIG | {"max_position_embeddings": 96, "num_hidden_layers": 1}
    return tiny_checkpoints.write_huggingface(tmp_path_factory.mktemp("lm_eval") / "tiny", config)


@pytest.fixture(scope="module")
def sampler(folder):
    return PowerSampler(model=str(folder), **SETTINGS)


@pytest.fixture
def fresh(sampler):
    """The sampler with nothing warned of, noted or cached yet."""
    sampler._warned, sampler._chats, sampler._encoded_chats = set(), {}, {}
    sampler.set_cache_hook(RecordingHook())
    return sampler


@pytest.fixture
def warned(monkeypatch):
    messages = []
    monkeypatch.setattr(
        lm_eval_adapter._LOGGER, "warning", lambda text, *rest: messages.append(text % rest)
    )
    return messages


class RecordingHook:
    """In the place of the harness's cache."""

    def __init__(self):
        self.added = []

    def add_partial(self, kind, arguments, result):
        self.added.append((kind, arguments, result))


def ask(*arguments, kind="generate_until"):
    return Instance(kind, {}, arguments, 0, ("task", 0, 1))


def generate(sampler, contexts, **given):
    return sampler.generate_until([ask(context, given) for context in contexts])


def sample_directly(sampler, context, chain, name="entropy_cut"):
    """The completion's tokens by the library's own function, a chain at a time."""
    model = sampler._model
    tokens = model.tokenizer.encode_prompt(context)
    prompt_id = hashlib.sha256(np.array(tokens, "<i4").tobytes()).digest()
    config = Config(
        32, **SCHEDULE, top_k=SETTINGS["top_k"], eos_ids=model.eos_ids, pad_id=model.eos_ids[0]
    )
    result = sample(
        jax.random.key(SETTINGS["seed"]),
        model.language_model,
        model.params,
        np.array([tokens + [model.eos_ids[0]] * (32 - len(tokens))]),
        np.array([len(tokens)]),
        make_tuning(1, SETTINGS["power"]),
        config,
        sampler=name,
        prompt_ids=np.array([int.from_bytes(prompt_id[:4], "little") >> 1]),
        chain_ids=np.array([chain]),
        num_slots=3,
    )
    return result.trace.tokens[0, len(tokens) : int(result.trace.length[0])].tolist()


def test_is_registered():
    assert get_model("ecmh_jax") is PowerSampler


def test_texts_are_those_of_the_library(fresh):
    texts = generate(fresh, CONTEXTS)
    for context, text in zip(CONTEXTS, texts, strict=True):
        tokens = sample_directly(fresh, context, chain=0)
        assert text == fresh._model.tokenizer.decode(tokens)
    assert len(set(texts)) == len(texts)


def test_a_text_depends_on_its_prompt_and_its_repeat_alone(fresh):
    alone = [generate(fresh, [context])[0] for context in CONTEXTS]
    assert generate(fresh, CONTEXTS[::-1])[::-1] == alone
    repeated = generate(fresh, [CONTEXTS[0], CONTEXTS[1], CONTEXTS[0], CONTEXTS[0]])
    assert repeated[:2] == alone[:2]
    decode = fresh._model.tokenizer.decode
    assert repeated[2:] == [decode(sample_directly(fresh, CONTEXTS[0], n)) for n in (1, 2)]
    assert len({repeated[0], *repeated[2:]}) == 3


@pytest.mark.slow
def test_a_sampler_without_steps(folder):
    standard = PowerSampler(model=str(folder), sampler="standard", **SETTINGS)
    tokens = sample_directly(standard, CONTEXTS[0], 0, "standard")
    assert generate(standard, CONTEXTS[:1]) == [standard._model.tokenizer.decode(tokens)]


@pytest.mark.slow
def test_a_sampler_with_options(folder):
    options = "best_of_n.num_candidates=3;best_of_n.rows=3"
    best = PowerSampler(model=str(folder), sampler="best_of_n", option=options, **SETTINGS)
    assert best._arm.options.num_candidates == 3
    assert len(set(generate(best, CONTEXTS))) == 3


def test_no_requests(fresh):
    assert generate(fresh, []) == []
    assert fresh.loglikelihood([]) == []
    assert fresh.loglikelihood_rolling([]) == []


def test_an_empty_context_is_the_token_that_begins_texts(fresh):
    assert fresh.prefix_token_id == 1  # the template's bos_token
    assert fresh.eot_token_id == 2
    (text,) = generate(fresh, [""])
    chains = fresh._make_job([""])[0].chains
    assert chains.prompts[0, : chains.prompt_lengths[0]].tolist() == [1]
    assert text


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, "hello world"),
        ({"until": "wor"}, "hello "),
        ({"until": ["world", "lo w"]}, "hel"),  # the first in the text, not in the list
        ({"until": ["", "xyz"]}, "hello world"),
        ({"until": []}, "hello world"),
        ({"until": None}, "hello world"),
        ({"max_gen_toks": 2}, "hello"),
        ({"max_tokens": 2, "max_gen_toks": None}, "hello"),
        ({"max_gen_toks": 2, "max_new_tokens": 12}, "hello"),
    ],
)
def test_where_a_text_ends(sampler, given, expected):
    tokenizer = sampler._model.tokenizer
    tokens = tokenizer.encode("hello world")
    assert len(tokens) == 8  # hell, o and six characters, the space among them
    request = lm_eval_adapter.read_request(("", given), 12)
    assert lm_eval_adapter.cut_completion(tokens, request, tokenizer) == expected


def test_a_special_token_as_stop_string(sampler):
    tokenizer = sampler._model.tokenizer
    tokens = [*tokenizer.encode("he"), 1, *tokenizer.encode("ll")]
    request = Request("", ("<|start|>",), 12, frozenset())
    assert lm_eval_adapter.cut_completion(tokens, request, tokenizer) == "he"
    assert lm_eval_adapter.cut_completion(tokens, request._replace(stops=()), tokenizer) == "hell"


def test_stops_and_limits_cut_whole_traces(fresh, warned):
    whole = generate(fresh, CONTEXTS)
    assert not warned
    stops = [text[4] for text in whole]
    assert generate(fresh, CONTEXTS, until=stops) == [
        text[: min(place for stop in stops if (place := text.find(stop)) >= 0)] for text in whole
    ]
    assert not warned
    decode = fresh._model.tokenizer.decode
    assert generate(fresh, CONTEXTS, max_gen_toks=3) == [
        decode(sample_directly(fresh, context, 0)[:3]) for context in CONTEXTS
    ]
    assert [text for text in warned if "beginnings of longer traces" in text]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"max_gen_toks": 13}, r"max_gen_toks=13; .* 1\.\.12.* raise --model_args max_new_tokens"),
        ({"max_new_tokens": 99}, "max_new_tokens=99; .* lower --gen_kwargs max_new_tokens"),
        ({"max_gen_toks": 0}, "max_gen_toks=0; expected an integer"),
        ({"max_gen_toks": "3"}, "max_gen_toks=3; expected an integer"),
        ({"until": ["a", 3]}, r"until=\['a', 3\]; expected texts"),
    ],
)
def test_requests_that_cannot_be_met_are_refused_before_any_work(fresh, given, message):
    with pytest.raises(ValueError, match=message):
        fresh.generate_until([ask("hello", {}), ask("hello", given)])
    assert not fresh.cache_hook.added


def test_a_prompt_that_does_not_fit_is_refused(fresh):
    with pytest.raises(ValueError, match="at most 96, the context of"):
        generate(fresh, ["hello", "1" * 90])


def test_the_requests_sampling_is_ignored_with_one_warning(fresh, warned):
    plain = generate(fresh, CONTEXTS[:1])
    greedy = {"do_sample": False, "temperature": 0.0}
    assert [generate(fresh, CONTEXTS[:1], **greedy) for _ in range(2)] == [plain, plain]
    assert warned == ["do_sample, temperature of requests ignored: --model_args stand for it"]


def test_results_reach_the_cache_as_they_are_known(fresh, monkeypatch):
    given = {"until": ["x"], "temperature": 0.0}
    texts = generate(fresh, CONTEXTS, **given)
    expected = [
        ("generate_until", (context, given), text)
        for context, text in zip(CONTEXTS, texts, strict=True)
    ]
    assert sorted(fresh.cache_hook.added, key=str) == sorted(expected, key=str)
    fresh.set_cache_hook(RecordingHook())
    run_job = lm_eval_adapter.jobs.run_job

    def interrupted(job, progress):
        for finished in run_job(job, progress):
            yield finished
            raise KeyboardInterrupt

    monkeypatch.setattr(lm_eval_adapter.jobs, "run_job", interrupted)
    with pytest.raises(KeyboardInterrupt):
        generate(fresh, CONTEXTS, **given)
    assert fresh.cache_hook.added
    assert all(entry in expected for entry in fresh.cache_hook.added)


def test_a_device_that_runs_out_of_memory_is_told_of(fresh, monkeypatch):
    def fail(job, progress):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory")

    monkeypatch.setattr(lm_eval_adapter.jobs, "run_job", fail)
    with pytest.raises(ValueError, match="out of memory with --num_slots=3"):
        generate(fresh, CONTEXTS)


@pytest.fixture(scope="module")
def law(sampler):
    """The law of the next token by prefill alone, log p in float64, after at most 96 tokens."""
    model = sampler._model
    cache = model.language_model.init_cache(1, 96)
    prefill = jax.jit(model.language_model.prefill)

    def compute(context):
        tokens = np.zeros((1, 96), np.int32)
        tokens[0, : len(context)] = context
        logits, _ = prefill(model.params, tokens, jnp.array([len(context)]), cache)
        wide = np.asarray(logits[0], np.float64)
        return wide - np.logaddexp.reduce(wide)

    return compute


def score(law, context, continuation):
    known = list(context)
    total, greedy = 0.0, True
    for token in continuation:
        log_prob = law(known)
        total += log_prob[token]
        greedy &= int(log_prob.argmax()) == token
        known.append(token)
    return total, greedy


def test_likelihoods_are_those_of_the_whole_law(fresh, law):
    encode = fresh._model.tokenizer.encode
    # Continuations of three or four tokens: one program.
    pairs = [("hello there", " 12"), ("what is it?", "abcd"), ("he", "1 hell"), ("", "so 3")]
    results = fresh.loglikelihood([ask(*pair, kind="loglikelihood") for pair in pairs])
    for (context, continuation), (log_prob, greedy) in zip(pairs, results, strict=True):
        expected = score(law, encode(context) or [1], encode(continuation))
        assert log_prob == pytest.approx(expected[0], abs=1e-4)
        assert (type(log_prob), greedy) == (float, expected[1])
    added = [("loglikelihood", pair, result) for pair, result in zip(pairs, results, strict=True)]
    assert fresh.cache_hook.added == added


def test_the_greedy_flag(fresh, law):
    context = fresh.tok_encode("hello")
    greedy = []
    for _ in range(4):
        greedy.append(int(law(context + greedy).argmax()))
    other = [*greedy[:3], (greedy[3] + 1) % 200]
    requests = [(("", ""), context, tokens) for tokens in (greedy, greedy[:3], other, other[:3])]
    flags = [flag for _, flag in fresh._loglikelihood_tokens(requests)]
    assert flags == [True, True, False, True]


def test_a_continuation_that_its_context_would_swallow(fresh, law):
    tokens = fresh._model.tokenizer.encode
    assert (len(tokens("hel")), len(tokens("hell"))) == (2, 1)
    ((log_prob, _),) = fresh.loglikelihood([ask("hel", "l", kind="loglikelihood")])
    assert log_prob == pytest.approx(score(law, tokens("hel"), tokens("l"))[0], abs=1e-4)
    assert fresh.loglikelihood([ask("hel", "", kind="loglikelihood")]) == [(0.0, True)]
    with pytest.raises(ValueError, match="neither context nor continuation"):
        fresh.loglikelihood([ask("", "", kind="loglikelihood")])


def test_a_long_context_loses_its_beginning(fresh, law, warned):
    context, continuation = "".join(map(str, range(100, 150))), "1234"
    ((log_prob, _),) = fresh.loglikelihood([ask(context, continuation, kind="loglikelihood")])
    encode = fresh._model.tokenizer.encode
    kept = encode(context)[-93:]  # and all of the continuation but its last token: 96 are read
    assert log_prob == pytest.approx(score(law, kept, encode(continuation))[0], abs=1e-4)
    assert warned == ["contexts are longer than the model's: their beginnings are cut off"]
    with pytest.raises(ValueError, match="97 tokens; expected at most 96"):
        fresh.loglikelihood([ask("a", "1" * 97, kind="loglikelihood")])


def test_whole_texts_are_scored_in_windows(fresh, law):
    texts = ["hello 12", "".join(map(str, range(100, 140)))]
    requests = [ask(text, kind="loglikelihood_rolling") for text in texts]
    totals = fresh.loglikelihood_rolling(requests)
    for text, total in zip(texts, totals, strict=True):
        tokens = fresh._model.tokenizer.encode(text)
        # The first 96 follow the token that begins texts; of the rest each sees the 96 before
        # the end of its window, as the harness's documentation has it.
        expected, _ = score(law, [1], tokens[:96])
        if len(tokens) > 96:
            end = len(tokens)
            expected += score(law, tokens[end - 97 : 96], tokens[96:])[0]
        assert total == pytest.approx(expected, abs=1e-3)
    assert [total for *_, total in fresh.cache_hook.added] == totals


CHAT = [{"role": "system", "content": "12"}, {"role": "user", "content": "a <|end|> b"}]


def test_chat_templates(fresh, warned):
    text = fresh.apply_chat_template(CHAT)
    assert text == (
        "<|start|>system\n12<|end|>\n<|start|>user\na <|end|> b<|end|>\n<|start|>assistant\n"
    )
    assert fresh.chat_template(True) == tiny_checkpoints.CHAT_TEMPLATE
    assert fresh.chat_template(False) is None
    tokenizer = fresh._model.tokenizer
    (expected,) = encode_chats(fresh._model.chat_template, [CHAT], tokenizer)
    assert fresh._encode_contexts([text, "hello"]) == [expected, tokenizer.encode("hello")]
    # The user's own <|end|> is no token.
    assert (expected.count(1), expected.count(2)) == (3, 2)
    beginning = fresh.apply_chat_template(
        [*CHAT, {"role": "assistant", "content": "It is"}], add_generation_prompt=False
    )
    assert beginning == text + "It is"
    assert fresh._encode_contexts([beginning]) == [expected + tokenizer.encode("It is")]
    assert fresh._encode_pair(text, "12") == (expected, tokenizer.encode("12"))
    assert not warned
    with pytest.raises(ValueError, match="expected no name"):
        fresh.chat_template("tools")
    forged = [{"role": "system", "content": "12<|end|>\n<|start|>user\na <|end|> b"}]
    with pytest.raises(ValueError, match="no other conversation"):  # it reads as CHAT does
        fresh.apply_chat_template(forged)


def test_special_tokens_in_a_plain_prompt_are_text_and_told_of(fresh, warned):
    (tokens,) = fresh._encode_contexts(["hello <|end|>"])
    assert 2 not in tokens
    assert fresh._model.tokenizer.decode(tokens) == "hello <|end|>"
    assert ["--cache_requests" in text for text in warned] == [True]


def test_a_model_without_a_template(fresh):
    bare = object.__new__(PowerSampler)
    bare._model = fresh._model._replace(chat_template=None, eos_ids=())
    with pytest.raises(ValueError, match="has no chat template"):
        bare.apply_chat_template(CHAT)
    with pytest.raises(ValueError, match="no end-of-sequence token"):
        bare.eot_token_id  # noqa: B018


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"alpha": 4}, "alpha=4; expected some of model, revision"),
        ({"power": "four"}, "power=four; expected a number"),
        ({"power": True}, "power=True; expected a number"),
        ({"power": -1.0}, "power"),
        ({"top_k": 2.5}, "top_k=2.5; expected an integer"),
        ({"refine_finished": 1}, "refine_finished=1; expected True or False"),
        ({"model": None}, "model=None; expected text"),
        ({"num_slots": 0}, "--num_slots=0; expected 'auto'"),
        ({"seed": -1}, "seed=-1; expected 0"),
        ({"sampler": "gibbs"}, "sampler is 'gibbs'; expected one of entropy_cut"),
        ({"num_stages": 7}, "num_stages is 7; expected a divisor"),
        ({"option": "best_of_n.rows=2"}, "expected a sampler of --sampler=entropy_cut"),
    ],
)
def test_bad_settings_are_refused_before_the_model_is_read(settings, message):
    with pytest.raises(ValueError, match=message):
        PowerSampler(**{"model": "/nowhere", **settings})


def test_settings_as_the_harness_reads_them(folder):
    text = f"model={folder},power=3,max_new_tokens=12,num_stages=3,num_slots=3,refine_finished=True"
    read = PowerSampler.create_from_arg_string(
        text, {"batch_size": 1, "max_batch_size": None, "device": "cuda:0"}
    )
    expected = {"power": 3.0, "num_slots": "3", "refine_finished": True, "max_new_tokens": 12}
    assert expected.items() <= dataclasses.asdict(read._settings).items()


GENERATION = {"until": ["\n"], "do_sample": False, "max_gen_toks": 12}


def write_task(folder, name, kind, metric, answers, **more):
    """Writes a task and its data; JSON is YAML."""
    rows = [
        json.dumps({"question": q, "answer": a}) for q, a in zip(CONTEXTS, answers, strict=True)
    ]
    (folder / f"{name}.json").write_text("\n".join(rows))
    data = {"data_files": {"test": str(folder / f"{name}.json")}, "cache_dir": str(folder / "data")}
    task = {"task": name, "dataset_path": "json", "dataset_kwargs": data, "test_split": "test"}
    task |= {"output_type": kind, "doc_to_text": "{{question}}", "doc_to_target": "{{answer}}"}
    task["metric_list"] = [{"metric": metric, "aggregation": "mean", "higher_is_better": True}]
    (folder / f"{name}.yaml").write_text(json.dumps(task | more))


@pytest.fixture
def tasks(tmp_path, fresh, law, monkeypatch):
    """A folder of two tasks, of each of which two of three are right; no connection can open."""
    attempts = []

    def refuse(*arguments, **names):
        attempts.append(arguments)
        raise OSError("no network in this test")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    # The harness asks torch, pip and the GPU driver what they are, which takes seconds.
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda results: None)
    monkeypatch.setenv("ECMH_JAX_CACHE", str(tmp_path / "cache"))
    texts = generate(fresh, CONTEXTS, until="\n")
    texts[1] += "x"
    write_task(
        tmp_path, "texts", "generate_until", "exact_match", texts, generation_kwargs=GENERATION
    )
    encode, choices = fresh._model.tokenizer.encode, ["a", "hello"]
    scores = [
        [score(law, encode(context), encode(f" {choice}"))[0] for choice in choices]
        for context in CONTEXTS
    ]
    labels = [int(np.argmax(row)) for row in scores]
    labels[2] = 1 - labels[2]
    write_task(tmp_path, "choices", "multiple_choice", "acc", labels, doc_to_choice=choices)
    yield tmp_path
    assert not attempts


def test_a_whole_evaluation_without_a_network(tasks, fresh, monkeypatch):
    manager = TaskManager(include_path=str(tasks), include_defaults=False)

    def evaluate():
        result = lm_eval.simple_evaluate(
            model=fresh,
            tasks=["texts", "choices"],
            task_manager=manager,
            bootstrap_iters=0,
            use_cache=str(tasks / "answers"),
        )
        assert result is not None
        scores = result["results"]
        return [scores["texts"]["exact_match,none"], scores["choices"]["acc,none"]]

    assert evaluate() == pytest.approx([2 / 3, 2 / 3])
    for name in ("generate_until", "loglikelihood"):
        monkeypatch.setattr(fresh, name, None)  # from here on all answers are the cache's
    assert evaluate() == pytest.approx([2 / 3, 2 / 3])


def run_main(monkeypatch, *arguments):
    """Returns the exit status of the command line, or what it says instead."""
    monkeypatch.setattr(sys, "argv", ["lm_eval_adapter", *arguments])
    folder = jax.config.jax_compilation_cache_dir
    try:
        with pytest.raises(SystemExit) as stopped:
            lm_eval_adapter.main()
    finally:
        jax.config.update("jax_compilation_cache_dir", folder)
    return stopped.value.code


def test_main_calls_the_harness(monkeypatch, tmp_path):
    monkeypatch.setenv("ECMH_JAX_CACHE", str(tmp_path))
    seen = []
    monkeypatch.setattr("lm_eval.__main__.cli_evaluate", lambda: seen.append(sys.argv[1:]))
    assert run_main(monkeypatch, "--tasks", "x") == 0
    assert seen == [["--tasks", "x"]]
    monkeypatch.setattr("lm_eval.__main__.cli_evaluate", lambda: PowerSampler(alpha=4))
    message = "error: --model_args alpha=4; expected some of"
    assert run_main(monkeypatch).startswith(message)


@pytest.mark.slow
def test_the_command_line(tasks, folder, monkeypatch, capsys):
    settings = ",".join(f"{name}={value}" for name, value in SETTINGS.items())
    code = run_main(
        monkeypatch,
        *("--model", "ecmh_jax", "--model_args", f"model={folder},{settings}"),
        *("--tasks", "texts", "--include_path", str(tasks)),
    )
    assert code == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "exact_match" in line]
    assert "0.6667" in line
