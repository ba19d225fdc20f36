"""Chat templates: the checkpoint's own, sandboxed, with its refusals told to the client."""

from __future__ import annotations

import pytest
from support.fake_gateway import real_checkpoint

from baton.errors import CheckpointError, InvalidRequestError
from router.tokenization.chat_template import ChatTemplate


def render(source: str, *messages: dict[str, str]) -> str:
    return ChatTemplate(source, bos_token="<s>", eos_token=None).render(messages)


USER = {"role": "user", "content": "Hi <b>"}


def test_real_template_ends_where_the_answer_begins() -> None:
    source = real_checkpoint().chat_template
    assert source is not None
    prompt = render(source, {"role": "system", "content": "Be brief."}, USER)
    assert prompt == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi <b><|im_end|>\n"
        "<|im_start|>assistant\n"
    )


def test_developer_is_system_to_a_template_that_does_not_know_it() -> None:
    message = {"role": "developer", "content": "x"}
    assert render("{{ messages[0].role }}", message) == "system"
    known = "{{ messages[0].role }}{# developer #}"
    assert render(known, message) == "developer"


def test_helpers_that_published_templates_use() -> None:
    source = (
        "{{ bos_token }}{{ eos_token }}{% for m in messages %}{{ m | tojson }}"
        "{% if loop.first %}{% break %}{% endif %}{% endfor %}"
        "{% generation %}!{% endgeneration %}{{ strftime_now('%Y')[:2] }}"
    )
    assert render(source, USER, USER) == '<s>{"role": "user", "content": "Hi <b>"}!20'


def test_blocks_are_trimmed_as_templates_expect() -> None:
    assert render("  {% if true %}\nx\n  {% endif %}\ny") == "x\ny"


def test_refusal_of_the_template_names_messages_and_says_why() -> None:
    with pytest.raises(InvalidRequestError, match="roles must alternate") as caught:
        render("{{ raise_exception('roles must alternate') }}", USER)
    assert caught.value.param == "messages"


def test_crash_of_the_template_is_the_clients_error() -> None:
    with pytest.raises(InvalidRequestError, match="TypeError") as caught:
        render("{{ messages[0].content + 1 }}", USER)
    assert caught.value.param == "messages"


@pytest.mark.parametrize(
    "source",
    [
        "{{ messages.append(1) }}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ raise_exception.__globals__['json'] }}",
    ],
)
def test_template_cannot_leave_its_sandbox(source: str) -> None:
    with pytest.raises(InvalidRequestError):
        render(source, USER)


def test_template_that_does_not_compile_is_the_checkpoints_error() -> None:
    with pytest.raises(CheckpointError, match="does not compile"):
        render("{% if %}")
