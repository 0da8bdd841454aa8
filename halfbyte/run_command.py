"""`halfbyte run`: text from an artifact. Content on stdout as it comes, statistics on stderr."""

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TextIO, cast

import numpy as np

from .ir.errors import ModelError
from .runtime import Generation, Model, load
from .runtime.disk import writing

ISAS = ("auto", "scalar", "avx2", "avx512", "amx")
_COMMANDS = "Ctrl-C stops an answer, Ctrl-D leaves, /clear begins anew"
_HELP = "answer a prompt, chat, or score a text with a compiled model"


def add_parser(subparsers: Any) -> argparse.ArgumentParser:
    """Registers `run` with argparse's subparsers."""
    parser: argparse.ArgumentParser = subparsers.add_parser("run", help=_HELP, description=_HELP)
    parser.add_argument("artifact", help="folder NAME.hb that `halfbyte compile` made")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--prompt", metavar="TEXT", help="continue this text as it stands")
    what.add_argument("--chat", metavar="TEXT", help="answer this message (chat template)")
    what.add_argument("--interactive", action="store_true", help=f"chat; {_COMMANDS}")
    what.add_argument("--ids", type=_ids, metavar="1,2,3", help="continue these token ids")
    what.add_argument("--perplexity", metavar="FILE", help="score a text (- is stdin)")
    what.add_argument("--input", action="append", metavar="NAME=FILE.npy", help="an input of an "
                      "ONNX graph; once for each")  # fmt: skip
    parser.add_argument("--output", action="append", default=[], metavar="FILE.npy",
                        help="with --input: the outputs in their order, or NAME=FILE.npy; without "
                        "it their shapes are told")  # fmt: skip
    parser.add_argument("--logits", metavar="OUT.npy", help="with --ids: write the logits after "
                        "each token, float32 [tokens, vocab], and generate nothing")  # fmt: skip
    parser.add_argument("--system", metavar="TEXT", help="system message of a chat")
    _add_sampling(parser)
    parser.add_argument("--device", default="cpu", help="cpu (default), cuda or cuda:N")
    parser.add_argument("--threads", type=int, metavar="N", help="default: the physical cores")
    parser.add_argument("--isa", default="auto", choices=ISAS, help="default: this machine's best")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of a stream")
    return parser


def _add_sampling(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("sampling", "defaults: the model's generation_config.json")
    group.add_argument("--temperature", type=float, metavar="T", help="0 is greedy")
    group.add_argument("--top-k", type=int, metavar="K", help="0 is off")
    group.add_argument("--top-p", type=float, metavar="P", help="1 is off")
    group.add_argument("--min-p", type=float, metavar="P", help="0 is off")
    group.add_argument("--repetition-penalty", type=float, metavar="R", help="1 is off")
    group.add_argument("--seed", type=int, metavar="N", help="default: a new one each time")
    group.add_argument("--stop", action="append", default=[], metavar="TEXT",
                       help="end before this text; may be given several times")  # fmt: skip
    group.add_argument("--max-tokens", type=int, metavar="N", help="default: to the context's end")


def main(args: argparse.Namespace) -> int:
    """Runs the command. Raises ModelError or TargetError; returns the exit status."""
    if args.logits and args.ids is None:
        raise ModelError("--logits: needs token ids; add --ids 1,2,3")
    if args.input or args.output:
        from .run_onnx import run_arrays

        return run_arrays(args)
    with load(
        args.artifact,
        device=args.device,
        threads=args.threads,
        isa=args.isa,
        progress=upload_progress,
    ) as model:
        if args.interactive:
            return _interact(model, args)
        if args.perplexity:
            return _score(model, args)
        if args.logits:
            return _write_logits(model, args)
        return _answer(model, args)


def upload_progress(done: int, total: int) -> None:
    """A line on stderr, written over and over, while weights go to a device."""
    end = "\n" if done == total else ""
    print(f"\rweights: {done / 1e9:.1f} of {total / 1e9:.1f} GB", end=end, file=sys.stderr)


def _answer(model: Model, args: argparse.Namespace) -> int:
    if args.chat is not None:
        generation = model.chat(_conversation(args, args.chat), **_options(args))
    else:
        prompt = cast("str | Sequence[int]", args.prompt if args.ids is None else args.ids)
        generation = model.generate(prompt, **_options(args))
    text, interrupted = _stream(generation, None if args.json else sys.stdout)
    if args.json:
        print(json.dumps({"text": text, **_facts(generation, model)}, ensure_ascii=False))
    else:
        print()
        print(_summary(generation, model), file=sys.stderr)
    return 130 if interrupted else 0


def _interact(model: Model, args: argparse.Namespace) -> int:
    """A chat with memory. An answer that does not fit leaves the conversation as it was."""
    history = _conversation(args, None)
    for line in _lines():
        if line == "/clear":
            history = _conversation(args, None)
            continue
        if line.startswith("/") and line[1:].isalpha():
            print(f"{line}: no such command; {_COMMANDS}", file=sys.stderr)
            continue
        asked = {"role": "user", "content": line}
        try:
            generation = model.chat([*history, asked], **_options(args))
        except ModelError as error:
            print(f"{error}\n(/clear begins anew)", file=sys.stderr)
            continue
        text, _ = _stream(generation, sys.stdout)
        print()
        print(_summary(generation, model), file=sys.stderr)
        history += [asked, {"role": "assistant", "content": text}]
    return 0


def _lines() -> Iterator[str]:
    """What the user enters, until Ctrl-D. Ctrl-C drops the line."""
    import readline as _  # noqa: F401  line editing for input()

    while True:
        try:
            line = input("> " if sys.stdin.isatty() else "").strip()
        except KeyboardInterrupt:
            print()
            continue
        except EOFError:
            return
        if line:
            yield line


def _stream(generation: Generation, out: TextIO | None) -> tuple[str, bool]:
    """Shows the pieces as they come; the whole text, and whether Ctrl-C ended it."""
    pieces: list[str] = []
    try:
        for piece in generation:
            pieces.append(piece)
            if out:
                out.write(piece)
                out.flush()
    except KeyboardInterrupt:
        generation.close()
        return "".join(pieces), True
    return "".join(pieces), False


def _score(model: Model, args: argparse.Namespace) -> int:
    is_stdin = args.perplexity == "-"
    try:
        text = sys.stdin.read() if is_stdin else Path(args.perplexity).read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else error
        raise ModelError(f"{args.perplexity}: cannot read as UTF-8 text: {why}") from error
    ids = model.tokenizer.encode(text)
    value = model.perplexity(ids)
    if args.json:
        print(json.dumps({"perplexity": value, "tokens": len(ids)}))
    else:
        print(f"{value:.4f}")
        print(f"perplexity of {len(ids)} tokens", file=sys.stderr)
    return 0


def _write_logits(model: Model, args: argparse.Namespace) -> int:
    logits, path = model.logits(args.ids), Path(args.logits)
    with writing(path):
        unfinished = path.with_name(f".{path.name}.tmp")
        try:
            with unfinished.open("wb") as file:
                np.save(file, logits)
            unfinished.replace(path)
        finally:
            unfinished.unlink(missing_ok=True)
    facts = {"logits": args.logits, "shape": logits.shape, "last_argmax": int(logits[-1].argmax())}
    print(json.dumps(facts) if args.json else f"{args.logits} {logits.shape}", flush=True)
    return 0


def _conversation(args: argparse.Namespace, question: str | None) -> list[dict[str, str]]:
    given = [("system", cast(str | None, args.system)), ("user", question)]
    return [{"role": role, "content": text} for role, text in given if text is not None]


def _options(args: argparse.Namespace) -> dict[str, Any]:
    names = ("max_tokens", "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed",
             "stop")  # fmt: skip
    return {name: getattr(args, name) for name in names}


def _facts(generation: Generation, model: Model) -> dict[str, object]:
    statistics = generation.statistics
    return {
        "tokens": generation.tokens,
        "finish": statistics.finish,
        "prompt_tokens": statistics.prompt_tokens,
        "prefill_seconds": statistics.prefill_seconds,
        "decode_seconds": statistics.decode_seconds,
        "prefill_tokens_per_second": statistics.prefill_rate,
        "decode_tokens_per_second": statistics.decode_rate,
        "threads": model.session.threads,
        "isa": model.session.isa,
    }


def _summary(generation: Generation, model: Model) -> str:
    s = generation.statistics
    reused = f" ({s.reused_tokens} reused)" if s.reused_tokens else ""
    return (
        f"prompt {s.prompt_tokens} tokens{reused}, {s.prefill_rate:.1f} tok/s | "
        f"answer {s.new_tokens} tokens, {s.decode_rate:.1f} tok/s | {s.finish} | "
        f"{model.session.threads} threads, {model.session.isa}"
    )


def _ids(text: str) -> list[int]:
    try:
        return [int(word) for word in text.split(",")]
    except ValueError as error:
        message = f"expected numbers with commas, as 1,2,3, found {text!r}"
        raise argparse.ArgumentTypeError(message) from error
