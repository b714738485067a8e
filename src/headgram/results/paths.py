"""Where every file of a study lies. The only place that knows.

Every name may also be a wildcard of Snakemake's, such as `{model}`: paths are texts, and nothing is looked up.
"""

from __future__ import annotations

import posixpath
from dataclasses import dataclass

#: A circuit and a stack: whose heads something is about.
Place = tuple[str, str]


def between_streams(stack: str) -> bool:
    """Whether a stack's heads read another stream than the one that they write to, as cross-attention does: its name says so."""
    return "cross" in stack.split("_")


#: Tables that a merge and a derivation write for a model.
MERGED = ("heads", "spectra", "gram", "pairs")
DERIVED = ("overlap", "neighbours", "layers", "models")
#: Tables about two models of one lineage.
LINEAGE = ("drift", "changes", "matches")
#: Tables of models whose stacks are measured in both circuits.
COMPOSED = ("composition", "channels", "kernels")
#: Tables of models whose embeddings are read.
IN_TOKENS = ("tokens", "token_paths")
#: Tables of models whose lock says what stands around queries and keys.
TURNED = ("rotary", "frequencies")
#: What a rendering reads of stages that a model need not have, by stage.
RENDERED = {"composition": ("composition",), "rotary": TURNED, "tokens": ("tokens",)}
#: Tables that a study need not have of a model.
OPTIONAL = (*COMPOSED, *IN_TOKENS, *TURNED)
#: The folders that hold artifacts, their records among them; logs are nobody's results.
FOLDERS = ("atlas", "models", "provenance", "seed", "report")
RECORDS = ("models", "provenance", "report")
#: Below the folder of a stack's circuit, the files of each stage that cuts it into jobs: folder, and suffixes of the data files.
_PARTS = {"extract": ("weights", (".pt",)), "eigen": ("eigen", (".parquet", ".pt")), "gram": ("gram", (".parquet",))}


@dataclass(frozen=True)
class Results:
    """The paths below one results folder, `root`.

    Examples
    --------
    >>> Results("results").record("eigen", "gpt2", "self", "ov", "layers-000-011")
    'results/models/gpt2/self/ov/eigen/layers-000-011.json'
    >>> Results("results").table("heads", "gpt2")
    'results/atlas/heads/model=gpt2/heads.parquet'
    """

    root: str

    def part(self, stage: str, model: str, stack: str, circuit: str, name: str, suffix: str) -> str:
        """A file of one job of `extract`, `eigen` or `gram`: of a group or shard of layers, or of a row of tiles."""
        return f"{self.root}/models/{model}/{stack}/{circuit}/{_PARTS[stage][0]}/{name}{suffix}"

    def data(self, stage: str, model: str, stack: str, circuit: str, name: str) -> list[str]:
        """All data files of one job of `extract`, `eigen` or `gram`."""
        return [self.part(stage, model, stack, circuit, name, suffix) for suffix in _PARTS[stage][1]]

    def record(self, stage: str, model: str = "", stack: str = "", circuit: str = "", name: str = "") -> str:
        """The record of an artifact of any stage; of `lineage`, the earlier model is the name."""
        if stage in _PARTS:
            return self.part(stage, model, stack, circuit, name, ".json")
        return (
            f"{self.root}/"
            + {
                "merge": f"provenance/{model}.json",
                "derive": f"provenance/derived/{model}.json",
                "lineage": f"provenance/lineage/{model}/{name}.json",
                "around": f"provenance/around/{model}.json",
                "composition": f"provenance/composition/{model}.json",
                "rotary": f"provenance/rotary/{model}.json",
                "tokens": f"provenance/tokens/{model}.json",
                "render": f"report/data/{model}.json",
                "shell": "report/shell.json",
                "report": "report/index.json",
            }[stage]
        )

    def table(self, table: str, model: str) -> str:
        """A table of the atlas."""
        return f"{self.root}/atlas/{table}/model={model}/{table}.parquet"

    def pair_table(self, table: str, model: str, other: str) -> str:
        """A table of the atlas about a model and an earlier one."""
        return f"{self.root}/atlas/{table}/model={model}/other={other}/{table}.parquet"

    def around(self, model: str) -> str:
        """What stands around the projections of a model's stacks."""
        return f"{self.root}/models/{model}/around.pt"

    def turning(self, model: str) -> str:
        """Numbers of a model's heads that its table `heads` takes from the stage `rotary`."""
        return f"{self.root}/models/{model}/turning.parquet"

    def directions(self, model: str) -> str:
        """The directions of a model."""
        return f"{self.root}/atlas/directions/{model}.pt"

    def channel_directions(self, model: str) -> str:
        """What the strongest compositions of a model are made of."""
        return f"{self.root}/atlas/channel-directions/{model}.pt"

    def original(self, model: str) -> list[str]:
        """The original script's two files."""
        return [f"{self.root}/seed/{model}.json", f"{self.root}/seed/{model}-eigdirs.pt"]

    def report(self, name: str) -> str:
        """A file or folder of the report: `index.html`, `data`, `figures`."""
        return f"{self.root}/report/{name}"

    def log(self, *names: str) -> str:
        """The log of a job."""
        return f"{self.root}/logs/{'/'.join(names)}.log"

    def relative(self, path: str) -> str:
        """A path below the root, relative to it."""
        return posixpath.relpath(path, self.root)
