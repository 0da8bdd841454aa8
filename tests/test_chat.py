"""Chat templates: rendered as transformers renders them, and harmless whatever they try."""

import json
import time
from pathlib import Path

import pytest

from halfbyte.ir.errors import ModelError
from halfbyte.runtime.chat import ChatTemplate
from tests.fake_model import CHATML, write_artifact

TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}
HELLO = [{"role": "user", "content": "hi"}]


def render(source: str, messages: object = HELLO, **variables: object) -> str:
    variables = {"a": "ab", "b": [1], **variables}
    template = ChatTemplate(source, TOKENS, "tokenizer_config.json")
    return template.render(messages, **variables)  # pyright: ignore[reportArgumentType]  # hostile


def test_chatml() -> None:
    messages = [{"role": "system", "content": "Be <b>brief</b>."}, *HELLO]
    assert render(CHATML, messages) == (
        "<|im_start|>system\nBe <b>brief</b>.<|im_end|>\n"
        "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    )
    assert render(CHATML, add_generation_prompt=False) == "<|im_start|>user\nhi<|im_end|>\n"


def test_smollm2(shared: Path) -> None:
    folder = shared / "models" / "smollm2-135m-llmcompressor"
    config = json.loads((folder / "tokenizer_config.json").read_text())
    assert render(config["chat_template"]) == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face"
        "<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    )


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("{{ bos_token }}{{ messages[0].content }}{{ eos_token }}", "<s>hi</s>"),
        ("a\n  {% if true %}\nb\n  {% endif %}\nc", "a\nb\nc"),  # trim_blocks, lstrip_blocks
        ("{{ {'é': '<a>', 'b': [1, none]} | tojson }}", '{"é": "<a>", "b": [1, null]}'),
        ("{{ [1] | tojson(indent=2) }}", "[\n  1\n]"),
        ("{% for i in range(9) %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}", "01"),
        ("{% generation %}x{{ 1 }}{% endgeneration %}", "x1"),
        ("{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}"
         "{% endfor %}{{ ns.n }}", "1"),
        ("{% macro m(x) %}<{{ x }}>{% endmacro %}{{ m('a') ~ m('b') }}", "<a><b>"),
        ("{% for m in messages %}{{ loop.last }} {{ loop.length }}{% endfor %}", "True 1"),
        ("{% for x in [[1, [2]], 3] recursive %}{% if x is iterable %}({{ loop(x) }})"
         "{% else %}{{ x }}{% endif %}{% endfor %}", "(1(2))3"),
        ("{{ messages | map(attribute='role') | join(',') }}", "user"),
        ("{{ 'a-b'.split('-') | last }}{{ '%05.1f' % 2 }}{{ 'x' * 3 }}{{ 'b a'|replace(' ','') }}",
         "b002.0xxxba"),
        ("{%- set x %}{{ messages[0]['content'] | trim }}!{% endset -%}{{ x }}", "hi!"),
        ("{{ tools is none }} {{ missing is defined }} {{ missing }}", "True False "),
        ("{{ (1710000000 | string) ~ '' }}", "1710000000"),
        ("{{ strftime_now('%Y') | int > 2000 }}", "True"),
    ],
)  # fmt: skip
def test_renders(source: str, expected: str) -> None:
    assert render(source) == expected


def test_tools_and_long_documents() -> None:
    tools = [{"name": "f", "parameters": {"type": "object"}}]
    assert render("{% for t in tools %}{{ t | tojson }}{% endfor %}", tools=tools) == json.dumps(
        tools[0]
    )
    long = [{"role": "user", "content": "word </think> " * 100_000}]
    source = "{{ (messages[0].content.split('</think>') | last).strip() }}{{ messages[0].content }}"
    assert len(render(source, long)) == 1_400_000


def test_the_template_may_refuse() -> None:
    source = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(
        ModelError, match=r"tokenizer_config\.json: chat template: roles must alter"
    ):
        render(source)


HOSTILE = [
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ messages.__class__ }}",
    "{{ (messages | attr('__class__')).mro() }}",
    "{{ raise_exception.__globals__ }}",
    "{{ self.__init__.__globals__ }}",
    "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
    "{{ '{0.__class__}'.format(messages) }}",
    "{{ messages.append(1) }}",
    "{{ messages[0].update(role='x') }}",
    "{% include '/etc/passwd' %}",
    "{% import 'os' as os %}",
    "{{ open('/etc/passwd') }}",
    "{{ lipsum(10000) }}",
    "{% for i in range(1000000000) %}{% endfor %}",
    "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "{% for i in range(9999) %}{% for j in 'x' * 9999 %}{% endfor %}{% endfor %}",
    "{{ range(99999) | map('string') | map('center', 60000) | join }}",
    "{% macro m(n) %}{{ m(n) }}{{ m(n) }}{% endmacro %}{{ m(1) }}",
    "{% macro m(n) %}{% if n %}{{ m(n-1) }}{{ m(n-1) }}{% endif %}{% endmacro %}{{ m(60) }}",
    "{{ 'x' * 1000000000 }}",
    "{{ 9 ** 99999999 }}",
    "{% set ns = namespace(x=a) %}{% for i in range(60) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
    "{% set ns = namespace(x=a) %}{% for i in range(60) %}{% set ns.x = ns.x + ns.x %}{% endfor %}",
    "{% set ns = namespace(x=9) %}{% for i in range(60) %}{% set ns.x = ns.x * ns.x %}{% endfor %}",
    "{% set ns = namespace(x=b) %}{% for i in range(60) %}{% set ns.x = ns.x + ns.x %}{% endfor %}",
    "{% set ns = namespace(x=b) %}{% for i in range(60) %}{% set ns.x = [ns.x, ns.x] %}{% endfor %}"
    "{{ ns.x }}",
    "{% set ns = namespace(x=a) %}{% for i in range(60) %}"
    "{% set y %}{{ ns.x }}{{ ns.x }}{% endset %}{% set ns.x = y %}{% endfor %}",
    "{% set x = 'x' * 65536 %}{{ x | replace('x', x) }}",
    "{% set x = 'x' * 65536 %}{{ x.replace('x', x) }}",
    "{% set x = 'x' * 65536 %}{{ x.join([x] * 1000) }}",
    "{% set x = 'x' * 65536 %}{{ [x] * 1000 | length }}{{ ([x] * 1000) | join }}",
    "{{ 'x' | center(1000000000) }}",
    "{{ 'x'.ljust(1000000000) }}",
    "{{ '%1000000000d' % 1 }}",
    "{{ '%1000000000d' | format(1) }}",
    "{{ '{:1000000000}'.format(1) }}",
    "{{ '%*d' % (1000000000, 1) }}",
    "{{ '%*d' | format(1000000000, 1) }}",
    "{{ ('a\n' * 65536) | indent(65536) }}",
    "{{ ('\t' * 65536).expandtabs(65536) }}",
    "{{ ([[1]] * 65536) | tojson(indent=60000) }}",
    "{% for i in [1] recursive %}{{ loop(range(99999)) }}{% endfor %}",
    "{% for i in [1] recursive %}{{ loop([1, 1]) }}{% endfor %}",
    "{% for m in messages %}",
    "{{ messages[0].content.nothing.deeper }}",
    "{{ messages[5].role }}",
    "{{ 1 / 0 }}",
    "{{ 'a' + 1 }}",
    "{{ none() }}",
    "{{ " + "(" * 5000 + ")" * 5000 + " }}",
    "{{ " + "-" * 20000 + "1 }}",
    "{% if 1 %}" * 300 + "{% endif %}" * 300,
    "x" * (1 << 21),
]  # fmt: skip


@pytest.mark.parametrize("source", HOSTILE)
def test_hostile(source: str) -> None:
    start = time.perf_counter()
    try:
        shown = render(source)
    except ModelError as error:
        assert "tokenizer_config.json" in str(error) and len(str(error)) < 2000
    else:
        assert shown.strip() == "" or source.startswith("{{ messages.__class__"), shown[:200]
    assert time.perf_counter() - start < 20  # a busy machine; it takes at most 1


@pytest.mark.parametrize("messages", [[{"content": 1}], [{}], [{"role": None, "content": ["x"]}]])
def test_messages_the_template_does_not_expect(messages: object) -> None:
    try:
        render("{{ messages[0]['content'] + messages[0].role }}", messages)
    except ModelError as error:
        assert "chat template" in str(error)


def test_where_the_template_comes_from(tmp_path: Path) -> None:
    artifact = write_artifact(tmp_path / "m.hb")
    assert ChatTemplate.of(artifact).render(HELLO).startswith("<|im_start|>user\nhi")
    path = artifact.folder / "tokenizer_config.json"
    named = [{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}]
    path.write_text(json.dumps({"chat_template": named}))
    assert ChatTemplate.of(artifact).render(HELLO) == "d"
    path.write_text("{}")
    with pytest.raises(ModelError, match="no chat template"):
        ChatTemplate.of(artifact)
    path.write_text("[]")
    with pytest.raises(ModelError, match="wrong type"):
        ChatTemplate.of(artifact)
