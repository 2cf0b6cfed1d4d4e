"""How each family lays out a conversation, as chat templates."""

from typing import Final

PREFIX: Final = ("[gMASK]", "<sop>")  # begin every text that the models were taught with

# A role opens a turn; what a tool is called with stands beside the role, and the text follows on a new line.
_TURNS: Final = """\
{{- '[gMASK]<sop>' }}
{%- for message in messages %}
{%- set role = 'observation' if message.role == 'tool' else message.role %}
{{- '<|' + role + '|>' + (message.metadata or '') + 'BREAK' + message.content }}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|assistant|>' }}
{%- endif %}
"""

# ChatGLM2 numbers questions and answers, and knows no other roles: what a system says stands before the first question.
_ROUNDS: Final = r"""{{- '[gMASK]<sop>' }}
{%- set round = namespace(number=0) %}
{%- for message in messages %}
{%- if message.role == 'user' %}
{%- set round.number = round.number + 1 %}
{{- '[Round ' + round.number|string + ']\n\n问\uff1a' + message.content + '\n\n答\uff1a' }}
{%- else %}
{{- message.content + '\n\n' }}
{%- endif %}
{%- endfor %}
"""

TEMPLATES: Final = {
    "chatglm2": _ROUNDS,
    # The text is tokenized apart from the role's line there, so it begins with the space that every text begins with.
    "chatglm3": _TURNS.replace("BREAK", "\\n "),
    "glm-4": _TURNS.replace("BREAK", "\\n"),
}
