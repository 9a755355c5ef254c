"""A page that shows what the demo made."""

import html
from pathlib import Path
from typing import Any

from minildm.files import atomic_write

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem;
       color: #222; background: #fff }
img { max-width: 100%; height: auto } figure { margin: 2rem 0 } figcaption { color: #555 }
table { border-collapse: collapse } td, th { padding: .2rem .8rem; text-align: left;
       border-bottom: 1px solid #ddd }
"""

FIGURES = (
    ("samples.png", "Samples of the model just trained, one row a class."),
    ("samples_shipped.png", "The same from the shipped model, trained longer."),
    ("trajectory.png", "One sampling, from noise to picture: z_t, and the z0 predicted at each t."),
    ("reconstructions.png", "Validation emoji, and what the first stage makes of them."),
    ("loss_curves.png", "The losses of both stages."),
    ("samples_judged.png", "How often a classifier names the asked group: fresh model."),
    ("samples_shipped_judged.png", "The same for the shipped model."),
)


def write_report(run_dir: Path, results: dict[str, Any]) -> None:
    """Write `index.html` beside the pictures it shows; it needs no network."""
    figures = "\n".join(
        f'<figure><img src="{name}" alt="{html.escape(text)}">'
        f"<figcaption>{html.escape(text)}</figcaption></figure>"
        for name, text in FIGURES
    )
    page = f"""<!doctype html>
<html lang="en"><meta charset="utf-8"><title>minildm demo</title><style>{STYLE}</style>
<h1>minildm: a latent diffusion model, trained here</h1>
{_table(results)}
{figures}
<p>All numbers: <a href="results.json">results.json</a>. Checkpoints: <code>first_stage/</code>
and <code>diffusion/</code>.</p>
</html>
"""
    with atomic_write(run_dir / "index.html") as file:
        file.write(page.encode())


def _table(results: dict[str, Any]) -> str:
    judge, seconds = results["judge"], results["train_seconds"]
    rows = {
        "device": results["device"],
        "scale, seed": f"{results['scale']}, {results['seed']}",
        "training": ", ".join(f"{name} {s / 60:.1f} min" for name, s in seconds.items()),
        "PSNR of reconstructions": results["psnr_intervals"]["psnr"] + " dB",
        "PSNR of bicubic x4, for comparison": results["psnr_intervals"]["psnr_bicubic"] + " dB",
        "group named by the judge, samples": f"{judge['fresh']['accuracy_samples']:.2f} "
        f"(real pictures {judge['fresh']['accuracy_real']:.2f})",
        "the same, shipped model": f"{judge['shipped']['accuracy_samples']:.2f} "
        f"(real pictures {judge['shipped']['accuracy_real']:.2f})",
    }
    cells = "\n".join(
        f"<tr><th>{html.escape(k)}</th><td>{html.escape(v)}</td></tr>" for k, v in rows.items()
    )
    return f"<table>\n{cells}\n</table>"
