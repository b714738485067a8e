"""Renew the tables of docs/families.md: python docs/families.py"""

import sys
from importlib.metadata import version
from pathlib import Path

import headgram
from headgram.families.registry import families
from headgram.proofs.prove import known_types, markdown, prove
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


def main() -> None:
    """Prove every type, and write the page; nothing is written if a proof fails."""
    proofs = [prove(model_type) for model_type in known_types(walked=False)]
    if problems := [f"{proof.model_type}: {proof.problem}" for proof in proofs if not proof.ok]:
        sys.exit("\n".join(problems))
    by = ", ".join(f"{name} {version(name)}" for name in ("transformers", "torch"))
    summary = f"{len(proofs)} model types, proven by headgram {headgram.__version__} with {by}:"
    opened = [(*row, "yes" if row[-1] in known_types() else "no") for row in PAPER]
    rows = [("kind", "models", "model type", "opened"), ("---",) * 4, *((a, b, f"`{c}`", d) for a, b, c, d in opened)]
    missing = [f"`{proof.model_type}` lacks {reason}" for proof in proofs for reason in proof.missing]
    summary += f" {'; '.join(missing)}." if missing else " All four roles of every type are proven."
    page = renewed(PAGE.read_text(encoding="utf-8"), "proofs", "families", [summary, "", *markdown(proofs)])
    page = renewed(page, "remarks", "families", remarks())
    page = renewed(page, "paper", "families", ["| " + " | ".join(row) + " |" for row in rows])
    PAGE.write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()
