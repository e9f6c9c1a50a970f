"""Code that a model folder brings along is never run, and no loader is left that would."""

from __future__ import annotations

import ast
import json
from pathlib import Path

import pytest

from egspo.models import load_model, load_tokenizer
from tests.rooms import ROOT

_ASKS = {"AutoTokenizer", "AutoConfig", "AutoModel", "AutoModelForCausalLM", "AutoModelForMaskedLM"}


def test_a_folder_with_code_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Even where somebody at the keyboard would say yes."""
    proof = tmp_path / "proof"
    code = f"open({str(proof)!r}, 'w').close()\n"
    for name in ("evil", "tokenization_evil", "modeling_evil", "configuration_evil"):
        (tmp_path / f"{name}.py").write_text(code)
    auto = {
        "AutoTokenizer": ["tokenization_evil.Evil", None],
        "AutoConfig": "configuration_evil.Evil",
        "AutoModel": "modeling_evil.Evil",
    }
    for kind in ("evil", "llada"):
        config = {"model_type": kind, "auto_map": auto}
        (tmp_path / "config.json").write_text(json.dumps(config))
        tokenizer = {"tokenizer_class": "Evil", "auto_map": auto}
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(tokenizer))
        monkeypatch.setattr("builtins.input", lambda *_: "y")
        for load in (load_tokenizer, load_model):
            with pytest.raises((ValueError, OSError)):
                load(tmp_path)
        assert not proof.exists()


def _calls() -> list[tuple[str, str, ast.Call]]:
    found = []
    for file in [*(ROOT / "egspo").rglob("*.py"), *(ROOT / "benchmarks").rglob("*.py")]:
        for node in ast.walk(ast.parse(file.read_text("utf-8"))):
            if isinstance(node, ast.Call):
                where = f"{file.relative_to(ROOT)}:{node.lineno}"
                found.append((where, ast.unparse(node.func), node))
    return found


def test_no_loader_runs_what_it_loads() -> None:
    problems = []
    for where, name, call in _calls():
        given = {word.arg: ast.unparse(word.value) for word in call.keywords}
        owner, _, method = name.rpartition(".")
        if given.get("trust_remote_code", "False") != "False":
            problems.append(f"{where}: {name} trusts what it loads")
        if owner in _ASKS and method == "from_pretrained" and "trust_remote_code" not in given:
            problems.append(f"{where}: {name} asks the user whether to trust")
        if name in ("torch.load", "torch.jit.load") and given.get("weights_only") != "True":
            problems.append(f"{where}: {name} without weights_only=True")
        if name in ("pickle.load", "pickle.loads", "joblib.load", "dill.load", "marshal.loads"):
            problems.append(f"{where}: {name}")
        if name == "yaml.load" and given.get("Loader") != "_Loader":
            problems.append(f"{where}: yaml.load with another loader than the safe one")
        if name in ("exec", "eval") and not where.startswith("egspo/sandbox/"):
            problems.append(f"{where}: {name}")
    assert not problems


def test_the_yaml_loader_is_a_safe_one() -> None:
    import yaml

    from egspo.config import yaml_text

    assert issubclass(yaml_text._Loader, yaml.SafeLoader)
