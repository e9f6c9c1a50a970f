"""Completions that no model should be able to gain, hang or crash anything with."""

from __future__ import annotations

_MB = 1_000_000


def repeated(text: str) -> str:
    return text * (_MB // len(text))


SMALL = {
    "empty": "",
    "space": " \n\t",
    "unclosed": "<answer>",
    "closed only": "</answer>",
    "reversed": "</answer>42<answer>",
    "nested": "<answer><answer></answer></answer>",
    "format echo": "<reasoning>\n...\n</reasoning>\n<answer>\n...\n</answer>",
    "power tower": "<answer>9**9**9**9</answer>",
    "latex power tower": "<answer>\\boxed{9^{9^{9^{9}}}}</answer>",
    "call": "<answer>__import__('os').system('true')</answer>",
    "box unclosed": "\\boxed{\\frac{1}{2}",
    "box of box": "\\boxed{\\boxed{}}",
    "escapes": "<answer>\\boxed{\\}\\{</answer>",
    "surrogate": "<answer>\ud800</answer>",
    "null": "<answer>\0</answer>",
    "unicode digits": "<answer>４２</answer> ٤٢ 四十二",
    "superscript": "<answer>4²</answer>",
    "chinese": "<reasoning>三加四等于七。</reasoning><answer>答案是七</answer>",
    "arabic": "<answer>الجواب هو اثنان وأربعون</answer>",
    "emoji": "<answer>🙂🙂</answer>",
    "infinity": "<answer>inf</answer>",
    "nan": "<answer>nan</answer>",
    "exponent": "<answer>1e999999999</answer>",
    "fraction": "<answer>1/0</answer>",
}
HUGE = {
    "letters": repeated("a"),
    "digits": f"<answer>{repeated('9')}</answer>",
    "boxed digits": f"\\boxed{{{repeated('9')}}}",
    "parentheses": f"<answer>{repeated('(')}1{repeated(')')}</answer>",
    "minus": f"<answer>{repeated('-')}1</answer>",
    "sum": f"<answer>{repeated('1+')}1</answer>",
    "answers": repeated("<answer>\n1\n</answer>\n"),
    "open answers": repeated("<answer>"),
    "open reasoning": repeated("<reasoning>\n"),
    "betweens": "<reasoning>\n" + repeated("\n</reasoning>\n<answer>\n"),
    "almost between": "<reasoning>" + repeated("</reasoning> "),
    "gaps": "<reasoning>\na\n</reasoning>" + repeated(" \n") + "<answer>\n1\n</answer>",
    "boxes": repeated("\\boxed{"),
    "braces": "\\boxed{" + repeated("{}"),
    "backslashes": "\\boxed{" + repeated("\\"),
    "calculations": repeated("<<1+1="),
    "spaces": repeated(" "),
    "lines": "<reasoning>\n" + repeated("\n") + "</reasoning>\n<answer>\n1\n</answer>",
    "commas": f"<answer>1{repeated(',000')}</answer>",
    "after the answer": "<answer>\n1\n</answer>\n" + repeated("x"),
}
