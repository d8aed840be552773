"""The quickstart: the order of its stages, its last screen, and its plot."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[1] / "scripts"
sys.path.insert(0, str(SCRIPTS))

import quickstart  # noqa: E402

from rlhf.commands import pipeline  # noqa: E402
from rlhf.config import load  # noqa: E402
from rlhf.errors import Problem, RlhfError  # noqa: E402
from rlhf.metrics.intervals import Interval  # noqa: E402
from rlhf.report import plots  # noqa: E402
from rlhf.stages.registry import STAGES  # noqa: E402


def test_the_reward_model_is_examined_before_ppo_which_names_the_examination(monkeypatch, tmp_path):
    """Every override is a key of the shipped config; a failed examination ends the chain there, with its exit code."""
    monkeypatch.chdir(SCRIPTS.parent)
    made = []

    def bring_up_to_date(stage, path, overrides):
        config = load.load(STAGES[stage].config_class, path, overrides)
        made.append((stage, config))
        if stage == "eval-rm" and config.seed == 3:
            raise SystemExit(7)
        if stage == "ppo":
            raise RlhfError(Problem("GRD030", "rewards.0.examination", "the reward model failed.", ""))

    monkeypatch.setattr(pipeline, "bring_up_to_date", bring_up_to_date)
    with pytest.raises(SystemExit) as stop:
        quickstart.main(quickstart.quickstart, tmp_path, 3)
    assert stop.value.code == 7 and [stage for stage, _ in made] == ["sft", "train-rm", "eval-rm"]
    made.clear()
    with pytest.raises(SystemExit) as stop:
        quickstart.main(quickstart.quickstart, tmp_path, 4)
    assert stop.value.code == 7 and [stage for stage, _ in made] == ["sft", "train-rm", "eval-rm", "ppo"]
    configs = dict(made)
    assert {config.run_dir for config in configs.values()} == {f"{tmp_path}/{stage}" for stage in configs}
    assert configs["ppo"].rewards[0].examination == f"{tmp_path}/eval-rm" == configs["eval-rm"].run_dir


def test_the_last_screen_has_tickets_table_verdicts_and_commands(monkeypatch, tmp_path, capsys):
    gold = pytest.importorskip("quickstart_gold")
    rows = {name: {"gold": Interval(0.5, 0.25, 0.75), "safe": Interval(1.0, 1.0, 1.0)} for name in ("SFT", "PPO")}
    verdict = {"key": "accuracy", "says": "accuracy [x]", "verdict": "pass", "estimate": 0.75, "ci95": [0.5, 1.0]}
    (tmp_path / "eval.json").write_text(json.dumps({"verdict": "pass", "verdicts": [verdict]}))
    figures = {"gain": 0.4, "ci95": [0.3, 0.5], "gain_over_best_temperature": {"gain": 0.2}, "num_prompts": 300}
    summary = {"gold": figures, "kl": 3.5, "seconds": {"total": 200.0}, "peak_rss_mb": 700.0}
    quickstart.show_tickets([gold.Ticket("my kettle broke", {"SFT": ("no", 0.25), "PPO": ("word " * 90, 1.0)})])
    quickstart.show_table(rows, 300)
    quickstart.show_verdicts(tmp_path)
    quickstart.show_rest(summary, Path("runs/my own"))
    shown = capsys.readouterr().err
    commands = [line.strip() for line in shown.splitlines()[-3:]]
    shown = " ".join(shown.split())
    assert "ticket my kettle broke SFT 0.25 no PPO 1.00 word word" in shown and "word ... Gold on 300" in shown
    assert "SFT │ 0.50 ±0.25 │ 1.00 ±0.00" in shown and "pass 0.750 [0.500, 1.000] accuracy [x]" in shown
    assert "+0.40 [+0.30, +0.50] gold" in shown
    assert shlex.split(commands[1])[-2:] == ["show", "runs/my own/ppo"]
    assert [shlex.split(line)[-4:] for line in commands[::2]] == [
        ["chat", "runs/my own/ppo", "--reward", "runs/my own/train-rm"],
        ["--data", "demo:preferences", "--model", "demo:base"],
    ]


def test_the_plot_carries_the_intervals_of_the_table(monkeypatch, tmp_path):
    drawn = []
    monkeypatch.setattr(plots, "_write", lambda figure, path: drawn.append(figure))
    plots.bars({"gold": {"SFT": Interval(0.5, 0.4, 0.7), "PPO": Interval(0.9, 0.85, 0.93)}}, "mean", tmp_path / "x.png")
    [axes] = drawn[0].axes
    segments = [bars.errorbar.lines[2][0].get_segments()[0] for bars in axes.containers if hasattr(bars, "errorbar")]
    found = [[bar.patches[0].get_height() for bar in axes.containers if hasattr(bar, "patches")]]
    assert found == [[0.5, 0.9]]
    assert [segment[:, 1].tolist() for segment in segments] == [pytest.approx([0.4, 0.7]), pytest.approx([0.85, 0.93])]
    plots.plt.close(drawn[0])
