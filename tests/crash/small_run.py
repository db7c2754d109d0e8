"""The small run of the kill tests: the commands, in a folder of their own."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from crash.kill_points import Kill, read_book
from crash.lanes import End, Lanes, Order

NAME = "run"
SETTINGS = (
    "runs_dir=runs",
    "warmup_step=2",
    "update_step=2",
    "update_times=2",
    "per_device_train_batch_size=4",
    "lora_rank=4",
    "lora_dropout=0.1",
    "rows_per_part=64",
    "save_steps=1",
    "eval_strategy=epoch",
    "plot_loss=true",
    "preprocessing_num_workers=1",
)
UNTRAINED = ("warmup_step=0", "update_times=0", "save_steps=null", "eval_strategy=no", "fraction=0.2")


@dataclass(frozen=True)
class Recipe:
    """A method and settings over a demo.

    Attributes:
        data: dataset, eval_dataset and model as key=value. method: its name. more: further key=value.
    """

    data: tuple[str, ...]
    method: str = "loss"
    more: tuple[str, ...] = ()

    @classmethod
    def of(cls, demo, method: str = "loss", *more: str) -> Recipe:
        data = (
            f"dataset={demo.pool}",
            f"eval_dataset={demo.target}",
            f"model_name_or_path={demo.model}",
        )
        return cls(data, method, more)

    @property
    def settings(self) -> tuple[str, ...]:
        return ("--run", NAME, *self.data, *SETTINGS, *self.more)

    def round(self, *options: str) -> list[tuple[str, ...]]:
        """Return the one command that does everything."""
        return [("round", "2", "--method", self.method, *self.settings, *options)]

    def pick(self) -> list[tuple[str, ...]]:
        """Return the one command that scores, selects and writes rows, and trains nothing."""
        return [("pick", self.method, *self.settings, *UNTRAINED)]

    def stages(self, rounds: int = 2) -> list[tuple[str, ...]]:
        """Return the commands that do the same one by one."""
        commands = [("warmup", *self.settings, f"component_name={self.method}")]
        for number in range(1, rounds + 1):
            scored = ("--run", NAME, "runs_dir=runs", "--round", str(number))
            commands += [("score", *scored), ("select", *scored), ("train-round", *scored)]
        return commands


@dataclass(frozen=True)
class Bench:
    """A working directory in which commands are run, killed and run again."""

    lanes: Lanes
    folder: Path

    @property
    def run(self) -> Path:
        return self.folder / "runs" / NAME

    def book(self) -> list[tuple[str, str]]:
        return read_book(self.folder / "book")

    def writes(self) -> list[str]:
        return [name for event, name in self.book() if event == "visible"]

    def call(self, arguments: tuple[str, ...], **how) -> End:
        self.folder.mkdir(exist_ok=True)
        return self.lanes.run(Order(arguments, str(self.folder), **how))

    def finish(self, *commands: tuple[str, ...]) -> Bench:
        """Run commands to their ends."""
        for arguments in commands:
            end = self.call(arguments)
            assert end.code == 0, end.output
        return self

    def chain(self, commands: list[tuple[str, ...]], when: str) -> int:
        """Kill at the first write, run the same again up to its first new write, and so on to the end.

        Each restart makes one durable write of progress. Returns the number of kills.
        """
        kills, first = 0, 1 if when == "after" else 2
        for arguments in commands:
            write = 1
            while True:
                before = set(self.writes())
                end = self.call(arguments, kill=Kill(when, write))
                if not end.killed:
                    assert end.code == 0, end.output
                    break
                kills += 1
                # a round's log and plot are written again until its checkpoint is there: go past them
                write = first if set(self.writes()) - before else write + 1
                assert kills < 1000
        return kills
