"""The page and the pictures of real_model.py, from its numbers alone."""

from __future__ import annotations

from nanolaser import report
from nanolaser.report import decimal, percent

NAMES = {"warm": "warm start", "grpo": "GRPO", "laser": "**LaSeR**"}


def grid(head, rows) -> str:
    """A table of Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def pictures(found: dict) -> dict[str, str]:
    """File name -> SVG."""
    runs = {NAMES[name].strip("*"): (run["steps"], ()) for name, run in found["runs"].items()}
    made = {"real-curves.svg": report.curves(runs)}
    rows = {NAMES[name].strip("*"): [dict(zip(("r_s", "r_v", "response_tokens"), row))
                                     for row in rows]
            for name, rows in found["r_s"].items() if name != "grpo"}  # fmt: skip
    return made | ({"real-r_s.svg": report.histograms(rows)} if rows else {})


def main_table(found: dict) -> str:
    """Accuracy, verification and votes, an interval each."""
    columns = ("one solution", "majority of 8", "weighted of 8", "best of 8", "any of 8", "F1",
               "AUROC", "within problem")  # fmt: skip
    cell = lambda x: f"{percent(x[0])} [{percent(x[1])}, {percent(x[2])}]"  # noqa: E731
    return grid(["", *columns], [
        [NAMES[name], *("-" if row[c][0] is None else cell(row[c]) for c in columns)]
        for name, row in found["results"].items()])  # fmt: skip


def reading_table(found: dict) -> str:
    """Who can tell right from wrong on the same solutions: AUROC, and within problems."""
    pair = lambda x: "-" if x is None else f"{percent(x[0])}, {percent(x[1])}"  # noqa: E731
    probes = found["probe"] or {}
    rows = []
    for name, row in found["results"].items():
        of = probes.get(name)
        rows.append([
            NAMES[name], pair([row["AUROC"][0], row["within problem"][0]]),
            pair(of and [of["auroc"], of["auroc_within"]]),
            *(pair(row.get(s)) for s in ("p-yes", "mean-logprob", "vote-share"))])
    head = ["", "r_s", "probe", "asked in words", "mean log-prob", "share of votes"]
    return grid(head, rows)


def c_ref_table(found: dict) -> str:
    """Every token that might be z_c."""
    rows = []
    for model, name in (("base", "untouched"), ("warm", "warm start")):
        entry = found["c-ref"]["models"][model]
        special = entry["special"]
        picked = [(special[0], "the default"),
                  *((x, "best special") for x in sorted(special[1:], key=lambda x: x["std"])[:2]),
                  *((x, "steadiest of all") for x in entry["steadiest"][:2])]
        rows += [[name, f"`{x['token']}`", kind, decimal(x["mean"], 2), decimal(x["std"], 2),
                  decimal(x["std"] / 10, 3), percent(x["auroc"])] for x, kind in picked]
    head = ["read by", "z_c", "", "mean, nats", "spread", "in r_s", "AUROC"]
    return grid(head, rows)


def page(found: dict) -> str:
    """docs/real-model.md."""
    return "\n\n".join([main_table(found), reading_table(found)]) + "\n"
