"""Do the kernels keep the tokens that exact arithmetic keeps? On a model and a text of your own:

    python benchmarks/agreement.py MODEL TEXT [--tokens 2048] [--final-keep 0.1]

Every layer's scores are computed twice from the same inputs, by the kernels and by the PyTorch path
in float64, and so are the survivors. For each layer it prints the share of survivors that both
keep. Some tokens are kept by only one of them. For these it prints how far their exact score lies
from that of the last survivor, at most (relative). It should be a tie within rounding.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import simba
from simba import ops


def compare(model: nn.Module, ids: Tensor, final_keep: float) -> list[dict[str, float]]:
    """Agreement and distance of each layer; see the module's docstring."""
    lines: list[dict[str, float]] = []
    simba.sparsify(model, final_keep, backend="triton", cuda_graph="never")
    keep = simba.status(model).keep_ratios
    kernels = ops.influence

    def both(
        x: Tensor,
        dt: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        anchor: Tensor | None = None,
        **options: Any,
    ) -> Tensor:
        scores = kernels(x, dt, A, B, C, anchor, **options)
        options = {k: v for k, v in options.items() if k != "backend"}
        bias = options.pop("dt_bias").double()
        wide = [t.double() for t in (x, dt, A, B, C)]
        exact = ops.influence_torch(
            wide[0], wide[1], wide[2], wide[3], wide[4], anchor, dt_bias=bias, **options
        )
        layer = len(lines)
        if layer + 1 < len(keep):
            k = max(1, round(keep[layer + 1] * ids.shape[1])) - 1  # besides the anchor
            ours, theirs = (s[0, :-1].flip(0).sort(descending=True, stable=True).indices[:k]
                            for s in (scores, exact))  # fmt: skip
            mine, truth = set(ours.tolist()), set(theirs.tolist())
            order = exact[0, :-1].flip(0)
            edge = order[theirs[-1]] if k else torch.tensor(0.0)
            off = [abs(float((order[t] - edge) / edge)) if edge != 0 else 0.0 for t in mine ^ truth]
            lines.append(
                {"tokens": x.shape[1], "kept": k + 1, "agreement": len(mine & truth) / max(k, 1),
                 "distance": max(off, default=0.0)}
            )  # fmt: skip
        return scores

    ops.influence = both
    try:
        with torch.no_grad():
            model(ids)
    finally:
        ops.influence = kernels
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("model", help="folder of a checkpoint, or its name on the hub")
    parser.add_argument(
        "text", type=Path, help="text file of at least 20,000 characters and the tokens"
    )
    parser.add_argument("--tokens", type=int, default=2048, help="of the prompt")
    parser.add_argument("--final-keep", type=float, default=0.1)
    parser.add_argument("--dtypes", nargs="*", default=["float32", "bfloat16"])
    parser.add_argument("--json", type=Path, help="write the table here")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("no GPU here; the tests compare the kernels with float64 in Triton's interpreter")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    text = args.text.read_text(encoding="utf-8")[20_000 : 20_000 + 12 * args.tokens]
    ids = tokenizer(text, return_tensors="pt").input_ids[:, : args.tokens].cuda()
    result = {}
    for dtype in (getattr(torch, name) for name in args.dtypes):
        model = AutoModelForCausalLM.from_pretrained(args.model, dtype=dtype).cuda().eval()
        lines = compare(model, ids, args.final_keep)
        result[str(dtype)] = lines
        print(f"\n{args.model}, {ids.shape[1]} tokens, final_keep={args.final_keep}, {dtype}")
        print("layer  tokens    kept  agreement  farthest disagreement from the edge")
        for layer, line in enumerate(lines):
            print(
                f"{layer:5}  {line['tokens']:6}  {line['kept']:6}  {line['agreement']:9.5f}  "
                f"{line['distance']:.1e}"
            )
    if args.json:
        args.json.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
