"""The command line: one short function a command, each ending with the next command to type.

Only the standard library is imported here; whatever is heavy is imported inside the command that needs it, so that
`--help` is quick. What a command was asked for goes to stdout; remarks, errors and the next command go to stderr.
"""

from __future__ import annotations

import logging
import os
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from stackllama.arguments import DATA_COMMANDS, Arguments, build_parser, parse
from stackllama.errors import RecipeError, StackllamaError
from stackllama.terminal import visible

if TYPE_CHECKING:
    from stackllama.recipe import Recipe
    from stackllama.run import Run

INTERRUPTED = 130
"""Exit code after Ctrl-C: 128 + SIGINT, as shells have it."""


PROCESS_SETTINGS = {
    # Threads that wait at a barrier sleep instead of spinning. Where anything else uses a core, spinning was measured
    # to slow training 10 to 80 times; where nothing does, sleeping costs little.
    "OMP_WAIT_POLICY": "PASSIVE",
    # Kernels that are kept for shapes seen before. Rows differ in length, so of the usual 1024 few are used again, and
    # they were measured to grow the process by 8 MB a step; within a row the same few serve all layers.
    "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "64",
}
"""Read when torch is loaded, so they are set before any command imports it; what the user has set stays."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code: 0, 2 for an error that the user can put right, 130 after Ctrl-C."""
    words = list(sys.argv[1:] if argv is None else argv)
    for name, value in PROCESS_SETTINGS.items():
        os.environ.setdefault(name, value)
    # Where it is installed, peft imports bitsandbytes, which warns on processors with AVX-512-bf16 that it could not
    # fetch a kernel. Nothing here uses that kernel.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    try:
        arguments = parse(words)
        COMMANDS[arguments.command](arguments)
        sys.stdout.flush()
    except StackllamaError as error:
        say(f"error: {error}")
        return error.exit_code
    except KeyboardInterrupt:
        again = shlex.join(["stackllama", *words])
        say(f"\nstopped; what was done up to the last checkpoint is kept. To go on, type: {again}")
        return INTERRUPTED
    except BrokenPipeError:  # the reader of our output has gone, as in `stackllama recipe show x | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        return _explain_full_disk(error)
    return 0


def say(text: str) -> None:
    """A line for the user, on stderr. Texts of a dump may stand in it, so control characters are written out."""
    print(visible(text), file=sys.stderr, flush=True)


def say_next(*words: str | Path) -> None:
    """The next command to type."""
    say(f"next: {shlex.join(['stackllama', *map(str, words)])}")


def run(arguments: Arguments) -> None:
    """`run RECIPE` and `quickstart`: every stage that is not complete yet, then the report."""
    from stackllama.run import open_run

    recipe = _load(arguments)
    source = _source(arguments, recipe)
    with open_run(recipe) as opened:
        _take_over(recipe, opened, source)
        from stackllama.stages.report import (
            run_report,  # seconds of imports, after all that can be wrong with the recipe
        )

        for command in _stage_commands(recipe):
            _run_stage(command, recipe, opened)
        run_report(recipe, opened)
    say_next("chat", opened.folder)


def stage(arguments: Arguments) -> None:
    """`data`, `sft`, `reward`, `ppo`, `dpo`, `evaluate`: one stage of a recipe."""
    from stackllama.run import POLICY_STAGES, open_run

    recipe, command = _load(arguments), arguments.command
    commands = _stage_commands(recipe)
    if command in POLICY_STAGES and recipe.policy in commands and command != recipe.policy:
        raise RecipeError(
            f"policy = {recipe.policy} makes the policy of this recipe, not {command}: add --policy {command}, or type "
            f"stackllama {recipe.policy}"
        )
    if command not in commands:
        raise RecipeError(
            f"a recipe on {recipe.data.source[0]} has no stage {command}; it has {', '.join(recipe.stages)}"
        )
    source = _source(arguments, recipe)
    with open_run(recipe) as opened:
        _take_over(recipe, opened, source)
        _run_stage(command, recipe, opened)
    if command != commands[-1]:
        say_next(commands[commands.index(command) + 1], opened.folder / "recipe.yaml")
    else:
        say_next("report", opened.folder)


def report(arguments: Arguments) -> None:
    """`report RUN`: write report.html from what the run has measured."""
    from stackllama.recipe_load import load_recipe
    from stackllama.run import find_run, open_run

    folder = find_run(arguments.options.run)
    recipe = load_recipe(folder / "recipe.yaml")
    with open_run(recipe, folder) as opened:
        from stackllama.stages.report import run_report

        run_report(recipe, opened)
    say_next("chat", folder)


def watch(arguments: Arguments) -> None:
    """`watch RUN`: the report, drawn anew in a browser while the run is made."""
    from stackllama.recipe_load import default_settings, load_recipe
    from stackllama.run import find_run

    options = arguments.options
    folder = find_run(options.run)
    defaults = default_settings(load_recipe(folder / "recipe.yaml").name)
    from stackllama.serve.live import watch as serve

    serve(folder, port=options.port, every=options.every, defaults=defaults)
    say_next("report", folder)


def compare(arguments: Arguments) -> None:
    """`compare RUN...`: the policies of several runs side by side, as tables, `--json` or `--page FILE`."""
    from stackllama.comparing import compare as beside

    say_next("report", beside(arguments.options))


def chat(arguments: Arguments) -> None:
    """`chat RUN`: questions and answers in the terminal."""
    from stackllama.run import find_run

    options = arguments.options
    folder = find_run(options.run)
    from stackllama.chat import chat as answer

    answer(
        folder, stage=options.stage, seed=options.seed, max_new_tokens=options.max_new_tokens, question=options.question
    )
    say_next("score", folder, "--question", "QUESTION", "--answer", "ANSWER")


def score(arguments: Arguments) -> None:
    """`score RUN`: one line an answer, its reward first."""
    from stackllama.run import find_run

    options = arguments.options
    folder = find_run(options.run)
    from stackllama.scoring import score as rewards_of

    rewards = rewards_of(folder, options.question, options.answer)
    for reward, answer in zip(rewards, options.answer, strict=True):
        print(f"{reward:+.4f}\t{' '.join(answer.split())}")
    say_next("chat", folder)


def judge(arguments: Arguments) -> None:
    """`judge RUN`: a judge behind an address compares the answers that the exam kept."""
    from stackllama.judging import judge as compared

    say_next("report", compared(arguments.options))


def lm_eval(arguments: Arguments) -> None:
    """`lm-eval RUN`: SFT model and policy on tasks of the lm-evaluation-harness."""
    from stackllama.run import find_run

    options = arguments.options
    folder = find_run(options.run)
    from stackllama.lm_evaluating import measure

    measure(folder, options.tasks, limit=options.limit, include=options.include_path)
    say_next("report", folder)


def data(arguments: Arguments) -> None:
    """`data fetch`, `data stats`, `data show`, `data export`."""
    from stackllama import data_commands

    following = data_commands.COMMANDS[arguments.command.removeprefix("data ")](arguments.options)
    if following:
        say_next(*following)


def plan(arguments: Arguments) -> None:
    """`plan RECIPE`: what each stage will take of memory, whether it fits, and what to change if not."""
    recipe = _load(arguments)
    from stackllama import planning

    for line in planning.plan(recipe, gpus=arguments.options.gpus, limit=arguments.options.memory):
        print(line)
    say_next("run", arguments.options.recipe)


def doctor(_: Arguments) -> None:
    """`doctor`: what this machine has and lacks."""
    from stackllama.doctor import examine

    for line in examine(Path.cwd()):
        print(line, flush=True)
    say_next("quickstart")


def recipe_show(arguments: Arguments) -> None:
    """`recipe show RECIPE`: the resolved recipe, as YAML on stdout."""
    from stackllama.recipe_load import to_yaml

    print(to_yaml(_load(arguments)), end="")
    say_next("run", arguments.options.recipe)


def recipe_reference(arguments: Arguments) -> None:
    """`recipe reference`: the page docs/recipe.md, or docs/summary.md."""
    from stackllama.recipe_reference import reference
    from stackllama.summary import summary_reference

    print(summary_reference() if arguments.options.summary else reference(), end="")


def version(_: Arguments) -> None:
    """`--version`."""
    from stackllama.environment import package_version

    print(f"stackllama {package_version('stackllama')}")


def help_(_: Arguments) -> None:
    """No command at all: the help."""
    build_parser().print_help()


COMMANDS: Mapping[str, Callable[[Arguments], None]] = {
    "quickstart": run,
    "run": run,
    "data": stage,
    "sft": stage,
    "reward": stage,
    "ppo": stage,
    "dpo": stage,
    "evaluate": stage,
    "report": report,
    "watch": watch,
    "compare": compare,
    "chat": chat,
    "score": score,
    "judge": judge,
    "lm-eval": lm_eval,
    **{f"data {name}": data for name in DATA_COMMANDS},
    "plan": plan,
    "doctor": doctor,
    "recipe show": recipe_show,
    "recipe reference": recipe_reference,
    "version": version,
    "help": help_,
}


def _load(arguments: Arguments) -> Recipe:
    from stackllama.recipe_load import load_recipe

    return load_recipe(arguments.options.recipe, arguments.overrides)


def _source(arguments: Arguments, recipe: Recipe) -> Path | None:
    """The folder of the run that `--from` names."""
    from stackllama.taking_over import find_source

    run = getattr(arguments.options, "source", None)
    return None if run is None else find_source(run, recipe)


def _take_over(recipe: Recipe, opened: Run, source: Path | None) -> None:
    """Take over what the run at `source` has finished and this one would do the same."""
    from stackllama.taking_over import take_over

    if source is not None:
        say(take_over(recipe, opened, source))


def _stage_commands(recipe: Recipe) -> list[str]:
    """The stage commands of a recipe, in order."""
    from stackllama.run import COMMANDS as STAGE_COMMANDS

    return list(dict.fromkeys(STAGE_COMMANDS[name] for name in recipe.stages))


def _run_stage(command: str, recipe: Recipe, opened: Run) -> None:
    """Run the stages of one command, unless they are all complete."""
    from stackllama.run import COMMANDS as STAGE_COMMANDS

    names = [name for name in recipe.stages if STAGE_COMMANDS[name] == command]
    if all(opened.is_complete(name) for name in names):
        say(f"{command}: complete already, kept (delete {opened.folder / names[0]} to make it again)")
        return
    opened.require(names[0])
    from stackllama.stages.table import STAGES

    try:
        STAGES[command](recipe, opened)
    except (MemoryError, RuntimeError) as error:  # torch's errors of memory are RuntimeErrors
        failed = error
    else:
        return
    # Outside of the handler: what the failed stage still holds goes first.
    _explain_out_of_memory(failed, recipe, command)


def _explain_out_of_memory(error: Exception, recipe: Recipe, command: str) -> None:
    """Raise the error that names the setting to change where memory ran out, and the error itself where it did not."""
    from stackllama import planning

    if not planning.is_out_of_memory(error):
        raise error
    error.__traceback__ = None  # its frames hold the tensors
    raise planning.explain_out_of_memory(error, recipe, command) from None


def _explain_full_disk(error: Exception) -> int:
    """Exit code 2 with a clear line where an unforeseen error is a full disk; anything else goes on as it is."""
    from stackllama.files import raise_if_full

    try:
        raise_if_full(error, Path(getattr(error, "filename", None) or Path.cwd() / "a file"))
    except StackllamaError as clear:
        say(f"error: {clear}")
        return clear.exit_code
    raise error


if __name__ == "__main__":
    sys.exit(main())
