"""Renew the tables of docs/families.md: python docs/families.py"""

import sys
from collections import Counter, defaultdict
from importlib.metadata import version
from pathlib import Path

import headgram
from headgram.families.around import rule_of
from headgram.families.registry import families, others
from headgram.proofs.prove import Proof, known_types, markdown, prove
from headgram.study.options_docs import renewed

PAGE = Path(__file__).with_name("families.md")
#: What the paper's code measures: where, the models, and their `model_type`.
PAPER = (
    ("language", "BERT, tiny to large", "bert"),
    ("language", "DistilBERT", "distilbert"),
    ("language", "ALBERT v2, base to xxlarge", "albert"),
    ("language", "RoBERTa base, large, large-mnli; DistilRoBERTa", "roberta"),
    ("language", "XLM-R base, large", "xlm-roberta"),
    ("language", "ModernBERT base, large", "modernbert"),
    ("language", "GPT", "openai-gpt"),
    ("language", "GPT-2, small to XL; DistilGPT-2", "gpt2"),
    ("language", "GPT-Neo 125M, 1.3B, 2.7B; TinyStories 1M to 28M", "gpt_neo"),
    ("language", "GPT-J 6B", "gptj"),
    ("language", "Pythia", "gpt_neox"),
    ("language", "Llama 2, 3, 3.1 and 3.2, 1B to 405B", "llama"),
    ("language", "Mistral 7B", "mistral"),
    ("language", "Mixtral 8x22B", "mixtral"),
    ("language", "MobileLLM 125M to 1.5B", "mobilellm"),
    ("language", "Phi-1, 1.5, 2", "phi"),
    ("language", "Phi-3 mini", "phi3"),
    ("language", "T5, encoder and decoder", "t5"),
    ("language", "BART, encoder and decoder", "bart"),
    ("language", "DeBERTa base, large", "deberta"),
    ("language", "DeBERTa v2 xlarge, xxlarge", "deberta-v2"),
    ("vision", "BEiT; DiT", "beit"),
    ("vision", "ViT, also on ImageNet-21k; DeiT; DINO", "vit"),
    ("vision", "ViT-MAE", "vit_mae"),
    ("vision", "DINOv2", "dinov2"),
    ("vision", "ImageGPT", "imagegpt"),
    ("vision", "GIT, image tower", "git"),
    ("vision", "DETR, encoder and decoder", "detr"),
    ("vision", "Mask2Former, decoder", "mask2former"),
    ("vision", "SAM, decoder", "sam"),
    ("audio", "HuBERT", "hubert"),
    ("audio", "MMS", "wav2vec2"),
    ("audio", "UniSpeech", "unispeech"),
    ("audio", "WavLM", "wavlm"),
    ("audio", "Speech2Text", "speech_to_text"),
    ("audio", "Whisper, Whisper v2, v3", "whisper"),
    ("audio", "SpeechT5, encoder and decoder", "speecht5"),
    ("audio", "MusicGen", "musicgen"),
)


def remarks() -> list[str]:
    """A table of what the families' data say about single roles."""
    rows = [
        (family.name, rule.name, ", ".join(remark.types) or "all", ", ".join(remark.roles), remark.text)
        for family in families()
        for rule in family.stacks
        for remark in rule.remarks
    ]
    head = ("family", "stack", "types", "roles", "remark")
    return ["| " + " | ".join(row) + " |" for row in (head, ("---",) * len(head), *dict.fromkeys(rows))]


def norms() -> list[str]:
    """A table of what stands around the queries and keys of all types of the registry, in their first stack."""
    owned = [(family, name) for family in families() if family.stacks for name in family.model_types]
    rules = [rule_of(family.stacks[0].around, name, {}) for family, name in owned]
    kinds = {"rms": "RMSNorm", "layer": "LayerNorm", "none": "none: the stream is read as it is"}
    before = Counter("not proven" if rule.norm is None else kinds[rule.norm.kind] for rule in rules)
    rows = [(f"norm before attention: {kind}", count) for kind, count in before.most_common()]
    rotary = Counter(rule.rotary.kind for rule in rules if rule.rotary is not None)
    rows += [(f"rotary encoding: {kind}", count) for kind, count in rotary.most_common()]
    rows += [
        ("gain stored as `γ - 1`", sum(rule.norm is not None and rule.norm.plus == 1 for rule in rules)),
        (
            "norm after attention",
            sum(rule.output_norm is not None and rule.output_norm.kind in ("rms", "layer") for rule in rules),
        ),
        (
            "gain after attention, without a norm",
            sum(rule.output_norm is not None and rule.output_norm.kind == "gain" for rule in rules),
        ),
        ("norms of queries and keys", sum(rule.query_norm is not None and rule.query_norm.kind != "none" for rule in rules)),
        ("bound of scores", sum(bool(rule.cap) for rule in rules)),
    ]
    shares = [(what, str(count), f"{count / len(rules):.0%}") for what, count in rows]
    head = (f"of {len(rules)} types", "types", "share")
    return ["| " + " | ".join(row) + " |" for row in (head, ("---",) * len(head), *shares)]


def left_out(proofs: list[Proof]) -> list[str]:
    """A table of the roles that are not read, with their reasons."""
    types = defaultdict(list)
    for proof in proofs:
        for reason in proof.missing:
            where, why = reason.split(": ", 1)
            role, stack = where.split(" of ")
            types[stack, why].append((role, proof.model_type))
    rows = [
        (stack, ", ".join(dict.fromkeys(role for role, _ in found)), ", ".join(dict.fromkeys(name for _, name in found)), why)
        for (stack, why), found in types.items()
    ]
    head = ("stack", "roles", "types", "reason")
    return ["| " + " | ".join(row) + " |" for row in (head, ("---",) * len(head), *rows)]


def main() -> None:
    """Prove every type, and write the page; nothing is written if a proof fails."""
    proofs = [prove(model_type) for model_type in known_types(walked=False)]
    if problems := [f"{proof.model_type}: {proof.problem}" for proof in proofs if not proof.ok]:
        sys.exit("\n".join(problems))
    by = ", ".join(f"{name} {version(name)}" for name in ("transformers", "torch"))
    summary = f"{len(proofs)} model types, proven by headgram {headgram.__version__} with {by}:"
    known = {*known_types(), *(name for family in others() for name in family.model_types)}
    opened = [(*row, "yes" if row[-1] in known else "no") for row in PAPER]
    rows = [("kind", "models", "model type", "opened"), ("---",) * 4, *((a, b, f"`{c}`", d) for a, b, c, d in opened)]
    page = renewed(PAGE.read_text(encoding="utf-8"), "proofs", "families", [summary, "", *markdown(proofs)])
    page = renewed(page, "remarks", "families", remarks())
    page = renewed(page, "norms", "families", norms())
    page = renewed(page, "left out", "families", left_out(proofs))
    page = renewed(page, "paper", "families", ["| " + " | ".join(row) + " |" for row in rows])
    PAGE.write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()
