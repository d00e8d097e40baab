"""What scripts/demo.sh prints at its end, from the figures that it left in its folder."""

import argparse
import json
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="folder of the demo's experiments")
    parser.add_argument("--share", action="store_true", help="only the share of high blocks")
    args = parser.parse_args()
    learned = read(args.folder / "reinforce40" / "val.json")
    if args.share:
        print(f"{learned['share']:.4f}")
        return
    others = [read(args.folder / name / "val.json") for name in ("random", "all_high")]
    speed = read(args.folder / "reinforce40" / "speed.json")
    print("\n".join(table([learned, *others], speed) + where(args.folder)))


def table(evaluations: list[dict], speed: dict) -> list[str]:
    def line(name: str, key: str, scale: float = 100) -> str:
        return f"{name:32}" + "".join(f"{scale * e[key]:10.2f}" for e in evaluations)

    times = [f"  {r['engine']:14}{r['p50_ms']:9.2f} ms   {r['how']}" for r in speed["rows"]]
    return [
        "",
        f"SwiftNet-RN18 on synthetic street scenes of {speed['width']}×{speed['height']}",
        "",
        f"{'high-resolution blocks placed:':32}{'by policy':>10}{'randomly':>10}{'all':>10}",
        line("mIoU, %", "miou"),
        line("high blocks, %", "share"),
        line("  where small classes are, %", "share_small"),
        line("  elsewhere, %", "share_plain"),
        line("GMACs per image", "gmacs", 1),
        "",
        "median time of one image:",
        *times,
        "",
    ]


def where(folder: Path) -> list[str]:
    return [
        f"where the policy looks   {folder}/reinforce40/viz/policy/*.png (bright: full resolution)",
        f"what the network sees    {folder}/reinforce40/viz/pred/*.png",
        f"curves and pictures      tensorboard --logdir {folder}",
        f"log and raw figures      {folder}/reinforce40/run.log, val.json, speed.json",
    ]


def read(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
