"""The `baton` command: reads the command line, hands over. Heavy imports wait."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

app = typer.Typer(
    name="baton",
    help="Serve large language models with prefill and decode in separate pools.",
    epilog="First steps: [bold]baton serve[/bold], then [bold]baton chat[/bold] "
    "in another terminal.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_show_locals=False,
)


class Dtype(StrEnum):
    auto = "auto"
    bfloat16 = "bfloat16"
    float32 = "float32"


class Device(StrEnum):
    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


class Quantization(StrEnum):
    none = "none"
    int8 = "int8"
    int4 = "int4"


class Backend(StrEnum):
    ray = "ray"
    processes = "processes"


class Transport(StrEnum):
    auto = "auto"
    shared_memory = "shared_memory"
    cuda_ipc = "cuda_ipc"
    nixl = "nixl"
    gloo = "gloo"


Cluster = Annotated[
    str | None,
    typer.Option("--cluster", metavar="NAME", help="Name of the cluster; 'default' by default."),
]
Url = Annotated[
    str | None,
    typer.Option(
        "--url",
        metavar="URL",
        help="Address of the server; by default the one that `baton serve` started here.",
    ),
]


def _nested(values: dict[str, Any]) -> dict[str, Any]:
    """``{"gateway.port": 1}`` as ``{"gateway": {"port": 1}}``, without what was not given."""
    tree: dict[str, Any] = {}
    for path, value in values.items():
        if value is None:
            continue
        *sections, key = path.split(".")
        place = tree
        for section in sections:
            place = place.setdefault(section, {})
        place[key] = value.value if isinstance(value, StrEnum) else value
    return tree


def _fail(message: str, code: int) -> typer.Exit:
    from rich.console import Console

    console = Console(stderr=True, highlight=False)
    console.print("[red]baton:[/red] ", end="")
    console.print(message, markup=False, soft_wrap=True)
    return typer.Exit(code)


@app.command(
    epilog="""[bold]Examples[/bold]

baton serve

baton serve --prefill 2 --decode 2 --port 8080

baton serve --model ./my-llama --dtype float32 --backend processes

baton serve --prefill 0      (no separate prefill: the ordinary baseline)

baton serve --config cluster.yaml --redis-url redis://:PASSWORD@127.0.0.1:6379/0
"""
)
def serve(
    model: Annotated[
        str | None,
        typer.Option(
            metavar="PATH|NAME",
            help="A known name, a Hugging Face folder, or a .gguf file; "
            "smollm2-135m-instruct by default.",
        ),
    ] = None,
    prefill: Annotated[
        int | None, typer.Option(metavar="N", help="Prefill workers; 1 by default.")
    ] = None,
    decode: Annotated[
        int | None, typer.Option(metavar="N", help="Decode workers; 1 by default.")
    ] = None,
    host: Annotated[
        str | None, typer.Option(metavar="ADDRESS", help="Listen here; 127.0.0.1 by default.")
    ] = None,
    port: Annotated[
        int | None, typer.Option(metavar="PORT", help="8000 by default; 0 takes a free one.")
    ] = None,
    gateways: Annotated[
        int | None,
        typer.Option(
            metavar="N", help="Gateways, on this port and the ones after it; 1 by default."
        ),
    ] = None,
    dtype: Annotated[
        Dtype | None,
        typer.Option(help="Of weights and KV; auto takes bfloat16 where the CPU computes in it."),
    ] = None,
    quantization: Annotated[
        Quantization | None,
        typer.Option(help="Keep weights in 8 or 4 bits; none by default."),
    ] = None,
    device: Annotated[
        Device | None,
        typer.Option(help="What computes; cpu by default. A GPU is best tried with --prefill 0."),
    ] = None,
    backend: Annotated[
        Backend | None, typer.Option(help="What runs the workers; ray by default.")
    ] = None,
    kv_transport: Annotated[
        Transport | None, typer.Option(help="How KV moves from prefill to decode.")
    ] = None,
    redis_url: Annotated[
        str | None,
        typer.Option(
            metavar="URL",
            envvar="REDIS_URL",
            show_envvar=True,
            help="The Redis of the registry; by default a private one is started.",
        ),
    ] = None,
    ray_address: Annotated[
        str | None,
        typer.Option(
            metavar="ADDRESS",
            help="A running Ray cluster; by default a private one is started.",
        ),
    ] = None,
    cluster: Cluster = None,
    config: Annotated[
        Path | None,
        typer.Option(metavar="FILE.yaml", help="Configuration; options given here win over it."),
    ] = None,
) -> None:
    """Start everything on this machine and serve until Ctrl-C.

    Starts gateways, prefill and decode workers, and a private Redis and Ray unless
    others are given. Answers the OpenAI API at http://HOST:PORT/v1. Workers and
    gateways that die are replaced, and so is a private Redis; where Ray dies,
    everything stops. `baton scale` changes the number of workers while it serves.
    """
    given = {
        "model": model,
        "pools.prefill.replicas": prefill,
        "pools.decode.replicas": decode,
        "gateway.host": host,
        "gateway.port": port,
        "gateway.replicas": gateways,
        "engine.dtype": dtype,
        "engine.quantization": quantization,
        "engine.device": device,
        "cluster.backend": backend,
        "cluster.ray_address": ray_address,
        "kv_transfer.transport": kv_transport,
        "registry.cluster": cluster,
    }
    try:
        code = _serve(config, _nested(given), (redis_url or "").strip() or None)
    except KeyboardInterrupt:  # before anything was started: the usual way to end it
        code = 0
    raise typer.Exit(code)


def _serve(file: Path | None, given: dict[str, Any], redis_url: str | None) -> int:
    from baton.config import load_config
    from baton.errors import ConfigurationError
    from cluster.serve import serve as run

    try:
        config = load_config(file, given)
    except ConfigurationError as error:
        raise _fail(error.message, 2) from None
    return run(config, redis_url=redis_url)


@app.command(
    epilog="""[bold]Examples[/bold]

baton chat

baton chat "What is the capital of France?" --temperature 0

baton chat --system "Answer in one sentence." --max-tokens 100

baton chat --url http://127.0.0.1:8080
"""
)
def chat(
    message: Annotated[
        str | None, typer.Argument(help="One question; without it, a conversation.")
    ] = None,
    url: Url = None,
    model: Annotated[
        str | None, typer.Option(metavar="NAME", help="By default the first that the server has.")
    ] = None,
    temperature: Annotated[
        float | None, typer.Option(min=0.0, metavar="T", help="0 is greedy.")
    ] = None,
    max_tokens: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Longest answer.")
    ] = None,
    system: Annotated[
        str | None, typer.Option(metavar="TEXT", help="The system's message.")
    ] = None,
    cluster: Cluster = None,
) -> None:
    """Chat with a running server; shows time to first token and tokens/s."""
    from baton.errors import BatonError
    from cluster.chat import ChatOptions
    from cluster.chat import chat as run
    from cluster.server_client import server_url
    from cluster.status import known_url

    try:
        address = url or known_url(cluster or "default")
        run(
            ChatOptions(server_url(address), model, temperature, max_tokens, system),
            message,
        )
    except BatonError as error:
        raise _fail(error.message, 1) from None


@app.command(
    epilog="""[bold]Examples[/bold]

baton status

baton status --json

baton status --url http://127.0.0.1:8080
"""
)
def status(
    url: Url = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="The gateway's own answer, for programs.")
    ] = False,
    cluster: Cluster = None,
) -> None:
    """Show the pools, their workers and how full their KV caches are.

    Where `baton serve` runs on this machine: also how large each pool should be.
    """
    from baton.errors import BatonError
    from cluster.status import show_status

    try:
        show_status(cluster or "default", url, as_json=as_json)
    except BatonError as error:
        raise _fail(error.message, 1) from None


@app.command(
    epilog="""[bold]Examples[/bold]

baton stop

baton stop --now

baton stop --cluster experiments
"""
)
def stop(
    now: Annotated[bool, typer.Option("--now", help="Do not wait for what is in flight.")] = False,
    cluster: Cluster = None,
) -> None:
    """Stop the server that `baton serve` started on this machine."""
    from baton.errors import BatonError
    from cluster.status import stop_server

    try:
        typer.echo(stop_server(cluster or "default", now=now))
    except BatonError as error:
        raise _fail(error.message, 1) from None


@app.command(
    epilog="""[bold]Examples[/bold]

baton scale decode=3

baton scale prefill=2 decode=3 --no-wait

baton scale decode=1 --url http://controller:8001      (token: BATON_CONTROLLER_TOKEN)
"""
)
def scale(
    wishes: Annotated[
        list[str],
        typer.Argument(metavar="POOL=N...", help="Pools and how many workers each should have."),
    ],
    wait: Annotated[
        bool, typer.Option("--wait/--no-wait", help="Wait until the pools are as wished.")
    ] = True,
    timeout: Annotated[
        float, typer.Option(min=0.0, metavar="SECONDS", help="The longest wait.")
    ] = 300.0,
    url: Annotated[
        str | None,
        typer.Option(
            "--url",
            metavar="CONTROLLER",
            help="Address of the controller; by default that of `baton serve` here.",
        ),
    ] = None,
    cluster: Cluster = None,
) -> None:
    """Change the number of workers of pools while they serve.

    A worker that leaves finishes its streams, or hands them to others once its
    bound (worker.drain_s) is over. New ones compute with as many threads as those
    that were started first: the machine's cores are not shared out anew.
    """
    from baton.errors import BatonError, InvalidRequestError
    from cluster.console import Progress
    from cluster.controller_client import known_controller
    from cluster.scale import parse_sizes
    from cluster.scale import scale as run

    try:
        sizes = parse_sizes(wishes)
        controller = known_controller(cluster or "default", url)
        run(controller, sizes, wait_s=timeout if wait else None, progress=Progress())
    except InvalidRequestError as error:
        raise _fail(error.message, 2) from None
    except BatonError as error:
        raise _fail(error.message, 1) from None
    except KeyboardInterrupt:
        raise _fail("not waited for to the end; the wish stands", 1) from None


def _show_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        typer.echo(f"baton {version('baton')}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version."),
    ] = False,
) -> None:
    """Options of the command itself; the help is the application's."""


def main() -> None:
    """Entry point of the `baton` script."""
    app()


if __name__ == "__main__":
    main()
