"""A run as text for a terminal."""

import collections
import shutil
import textwrap
from collections.abc import Sequence
from typing import Any

from experiments.quantities import describe_quantity

_SHADES = " ▁▂▃▄▅▆▇█"
_COMPLETIONS_SHOWN = 2  # distinct completions of each sampler
_CUT_BINS = 32
_COST = "cost: tokens decoded by chain, in standard samples"


def describe(result: dict[str, Any], seconds: float) -> str:
    """Returns the report of ``run_sample``'s result; ``seconds`` is the whole run's wall time."""
    width = min(shutil.get_terminal_size((100, 24)).columns, 110)
    model, device = result["model"], result["device"]
    weights = "" if model["weights"] == model["dtype"] else f", {model['weights']} weights"
    lines = [f"{model['name']}, {model['dtype']}{weights} on {device['kind']}"]
    if result["interrupted"]:
        lines.append("Interrupted: what follows covers the chains that had finished.")
    for prompt in result["prompts"]:
        rows = [row for row in result["rows"] if row["prompt_id"] == prompt["prompt_id"]]
        title = textwrap.shorten(prompt["prompt"], width - 12, placeholder=" ...")
        lines += ["", f"prompt {prompt['prompt_id']}: {title}", ""]
        lines += _table(prompt["samplers"])
        for sampler, numbers in prompt["samplers"].items():
            of_sampler = [row for row in rows if row["sampler"] == sampler]
            lines += ["", *_completions(sampler, of_sampler, width)]
            if numbers["attempted"]:
                lines += _chain_lines(numbers, of_sampler)
    lines += ["", "all prompts", "", *_table(result["samplers"]), ""]
    for sampler, numbers in result["samplers"].items():
        utilisation = numbers["slot_utilisation"]
        busy = "" if utilisation is None else f"slots {utilisation:.0%} busy, "
        lines.append(
            f"  {sampler}: {numbers['seconds']:.1f} s, "
            f"{numbers['tokens_per_second']:.0f} tokens/s "
            f"({numbers['effective_tokens_per_second']:.0f} effective), {busy}"
            f"{describe_quantity(numbers['flops'], 'FLOP')}, "
            f"compiled in {numbers['compile_seconds']:.1f} s"
        )
    lines += ["", f"  {_memory(result['memory'])}", f"  {_COST}"]
    lines.append(f"  whole run {seconds:.1f} s, model loading included")
    return "\n".join(lines)


def _memory(memory: dict[str, Any]) -> str:
    sizes = {
        name: describe_quantity(memory[f"{name}_bytes"], "B")
        for name in ("weights", "slots", "slot", "total", "available")
    }
    return (
        f"memory: {sizes['weights']} weights + {sizes['slots']} for {memory['num_slots']} slots "
        f"of {sizes['slot']} = {sizes['total']} reserved; {sizes['available']} were free for slots"
    )


def _table(samplers: dict[str, dict[str, Any]]) -> list[str]:
    header = (
        "sampler",
        "log p",
        "± s.e.",
        "per token",
        "tokens",
        "distinct",
        "accepted",
        "decoded",
        "cost",
    )
    cells: list[tuple[str, ...]] = [header]
    for sampler, numbers in samplers.items():
        if not numbers["chains"]:
            cells.append((sampler, *("-",) * (len(header) - 1)))
            continue
        rate = numbers["accepted"] / numbers["attempted"] if numbers["attempted"] else None
        cells.append(
            (
                sampler,
                f"{numbers['mean_log_prob']:.2f}",
                _optional(numbers["standard_error"], ".2f"),
                f"{numbers['mean_log_prob_per_token']:.3f}",
                f"{numbers['mean_num_tokens']:.1f}",
                f"{numbers['distinct']}/{numbers['chains']}",
                _optional(rate, ".0%"),
                f"{numbers['decoded_tokens']}",
                _optional(numbers["standard_samples_per_chain"], ".1f"),
            )
        )
    widths = [max(len(row[column]) for row in cells) for column in range(len(header))]
    return [
        "  "
        + row[0].ljust(widths[0])
        + "".join(f"  {cell:>{width}}" for cell, width in zip(row[1:], widths[1:], strict=True))
        for row in cells
    ]


def _optional(value: float | None, style: str) -> str:
    return "-" if value is None else format(value, style)


def _completions(sampler: str, rows: Sequence[dict[str, Any]], width: int) -> list[str]:
    """The most frequent completions, the likelier first among equals."""
    groups = collections.defaultdict(list)
    for row in rows:
        groups[tuple(row["tokens"])].append(row)
    ranked = sorted(groups.values(), key=lambda group: (-len(group), -group[0]["log_prob"]))
    lines = [f"  {sampler}"]
    for group in ranked[:_COMPLETIONS_SHOWN]:
        row = group[0]
        ending = "" if row["ended"] == "eos" else " [...]"
        head = f"    {len(group)} x  log p {row['log_prob']:8.2f}  "
        text = " ".join(row["text"].split()) + ending
        lines += textwrap.wrap(
            text, width, initial_indent=head, subsequent_indent=" " * len(head)
        ) or [head]
    if len(ranked) > _COMPLETIONS_SHOWN:
        lines.append(f"    and {len(ranked) - _COMPLETIONS_SHOWN} more distinct")
    return lines


def _chain_lines(numbers: dict[str, Any], rows: Sequence[dict[str, Any]]) -> list[str]:
    stages = ", ".join(
        f"{stage}: {rate:.0%}" for stage, rate in numbers["acceptance_by_stage"].items()
    )
    longest = max(row["num_tokens"] for row in rows)
    bins = min(_CUT_BINS, longest)
    counts = [0] * bins
    for row in rows:
        for _, _, cut, *_ in row["steps"]:
            counts[min((cut - 1) * bins // longest, bins - 1)] += 1
    peak = max(counts)
    shades = "".join(
        _SHADES[-(-count * (len(_SHADES) - 1) // peak)] if peak else " " for count in counts
    )
    return [
        f"    accepted by stage  {stages}",
        f"    cuts by position   1 |{shades}| {longest}",
        f"    tokens             {numbers['proposed_tokens']} proposed: "
        f"{numbers['decoded_tokens']} decoded, {numbers['replayed_tokens']} replayed, "
        f"up to {numbers['saved_tokens']} saved; "
        f"{numbers['null_moves']} of {numbers['attempted']} steps redrew the same trace",
    ]
