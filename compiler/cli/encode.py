"""`otc encode`: prompts → conditioning for artifacts without text encoders. Imports click only, as `cli` does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from .compile import check_packages, complete_models
from .options import quiet_option
from .stopped import stopped_error


@click.command("encode", short_help="Turn prompts into conditioning, on a host with torch.")
@click.argument("model", shell_complete=complete_models)
@click.option("--for", "artifact", type=click.Path(path_type=Path), required=True, help="Artifact that will be run.")
@click.option("--prompt", "prompts", multiple=True, required=True, help="What to draw; may be given several times.")
@click.option("--negative-prompt", help="What to steer away from.  [default: the artifact's]")
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path, dir_okay=False),
    default=Path("conditioning.safetensors"),
    show_default=True,
    help="safetensors file.",
)
@click.option("--revision", help="Branch, tag or commit of a hub model.  [default: its main branch]")
@click.option("--variant", help="Weights of MODEL where it stores several, such as fp16.  [default: the plain ones]")
@click.option("--trust-remote-code", is_flag=True, help="Run Python that comes with MODEL; refused without this.")
@click.option("--lora", type=click.Path(path_type=Path), help="Folder of the LoRA that the artifact was compiled with.")
@click.option("--force", is_flag=True, help="Overwrite an existing file.")
@quiet_option
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def encode_command(output: Path, force: bool, as_json: bool, quiet: bool, **choices: Any) -> None:
    """Encode prompts with MODEL's own text encoders for an artifact that was compiled from it.

    \b
    Examples:
      otc encode ./my-pipeline --for artifacts/mine --prompt "a red ring" -o ring.safetensors
      otc run artifacts/mine --budget 8 --conditioning ring.safetensors
    """
    check_packages("otc encode")
    from otcache.schemas.places import check_new_file

    from ..workspace.interrupts import Interrupted, interruptible
    from ..workspace.progress import reporter_for
    from ..workspace.quiet import quiet as quiet_libraries

    quiet_libraries()
    check_new_file(output, "-o", force=force)
    from ..passes.encode import encode

    reporter = reporter_for(as_json=as_json, verbose=False, quiet=quiet)
    try:
        with interruptible():
            shapes = encode(output, reporter=reporter, **choices)
    except Interrupted as stop:
        raise stopped_error("otc encode", stop) from None
    finally:
        reporter.close()
    if as_json:
        click.echo(json.dumps({"output": str(output), "tensors": shapes}))
        return
    click.echo(f"{output}: {', '.join(f'{name} {tuple(shape)}' for name, shape in shapes.items())}")
