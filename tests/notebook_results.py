"""What the executed notebooks' results must hold, by notebook: read by tests/test_notebooks.py."""

from collections.abc import Callable
from typing import Any


def results_of_00(results: dict[str, Any]) -> None:
    assert results["psnr"] > results["psnr_bicubic"] + 1 and results["n_psnr"] >= 50
    assert 0.3 < results["judge_accuracy"] <= 1 and results["n"] >= 20


def results_of_01(results: dict[str, Any]) -> None:
    for kind in ("emoji", "photographs"):
        assert 1 < results["lossless"][kind] < 8 and results["late_share"][kind] > 0.5
        assert results["semantic_bits"] < 0.1 * results["bits_per_dim"][kind]
        assert results["kept"][kind]["0-1"] > results["kept"][kind]["32-63"] + 0.3
    assert results["codes_against_jpeg"]["emoji"] > 0 > results["codes_against_jpeg"]["photographs"]
    assert results["step_ratios"][0] >= 16


def results_of_02(results: dict[str, Any]) -> None:
    untrained, own, shipped = results["psnr"].values()
    assert untrained + 3 < own < shipped and results["n_psnr"] >= 40
    assert results["psnr_photographs"] < results["psnr_photographs_bicubic"]
    weak, *_, strong = results["ablation"].values()
    assert strong["kl"] < weak["kl"] and strong["psnr"] < weak["psnr"]
    assert 0 < weak["noise_share"] < strong["noise_share"] <= 1
    least, most = results["of_batch"]
    assert least < 1 < most


def results_of_03(results: dict[str, Any]) -> None:
    alone, restarted = results["last_epoch"].values()
    assert restarted["code_usage"] > 5 * alone["code_usage"]
    assert alone["perplexity"] >= 1 and restarted["perplexity"] <= results["K"]
    assert results["psnr"]["idle codes move"] > results["psnr"]["left alone"]
    assert 1 < results["perplexity_of_batches"] < results["perplexity"]
    bits = results["bits"]
    assert bits["codes, packed"] < bits["codes (5)"] < bits["KL latent, float16"] < bits["picture"]


def results_of_04(results: dict[str, Any]) -> None:
    far, noise = results["claims"]["proxy_fid"], list(results["claims"]["kl"]["noise"].values())
    assert far["real"][0] < far["mean and covariance"][0] < far["N(0, I)"][0]
    assert noise[-1] < 0.02 < noise[0] and len(results["scores"]) == 4
    for scores in results["scores"].values():
        assert scores["emoji"]["psnr"] > scores["photographs"]["psnr"] > 10
        assert 0 < scores["emoji"]["perceptual"] < scores["photographs"]["perceptual"] < 4


def results_of_05(results: dict[str, Any]) -> None:
    for kind in ("kl", "vq"):
        values = [results["table_psnr"][f"{kind}-f{f}"] for f in (2, 4, 8, 16, 32)]
        assert values == sorted(values, reverse=True) and values[0] > values[-1] + 10
    assert results["same_order"] == 45 and "VQ" not in results["clearly_better"].values()
    assert set(results["own_psnr"]) == {"f4", "f16"}


def results_of_06(results: dict[str, Any]) -> None:
    least, times = results["least"], results["times"]
    assert len(least) == len(times) and least[0] > 0.5 > 0.01 > least[-1]
    assert min(min(row) for row in results["excess"].values()) > -0.01  # none beats the best
    few, five = results["few_steps"], results["spread"]["5 steps"]
    assert few["5 steps"] > few["20 steps"] > few["100 steps"] and 0.5 < five < 0.85
    early, late = results["shipped_loss"]
    assert early > 10 * late > 0
    copied, drawn = results["copies"]
    assert copied < 0.02 < 0.2 < drawn < 2


def results_of_07(results: dict[str, Any]) -> None:
    losses, sizes = results["loss"], results["parameters"]
    assert len(losses) == 7 and all(0 < loss < 1.5 for loss in losses.values())
    assert sizes["no attention"] < sizes["the full UNet"] == sizes["no time"] == sizes["no skips"]
    assert sizes["half the width"] < 0.3 * sizes["the full UNet"]
    assert [round(millions) for millions in results["paper_millions"]] == [401, 274]
    assert all(0.9 < sum(shares.values()) <= 1 for shares in results["levels"].values())
    assert results["checkpointing"]["memory"] < 0.6 and results["read_off"] > 0.9


def results_of_08(results: dict[str, Any]) -> None:
    far = {name: found["value"] for name, found in results["proxy_fid"].items()}
    assert set(far) > {"latents", "large", "small", "pixels", "noise"} and min(far.values()) > 0
    assert far["first stage alone"] < far["latents"]
    loss = results["loss"]
    assert loss["5 × too small"] < loss["right"] < loss["5 × too large"]
    assert results["step_ratio"] > 1 and results["pixel_steps"] < results["steps"]
    copies, samples = (results["nearer_to_train"][key] for key in ("copies", "samples"))
    assert copies["value"] > 0.5 > samples["value"]


def results_of_09(results: dict[str, Any]) -> None:
    assert abs(results["order"]["ddim"] - 1) < 0.1 and abs(results["order"]["heun"] - 2) < 0.15
    ends = {name: gaps[-1] for name, gaps in results["distance"].items()}
    assert ends["dpm_solver_pp"] < ends["ddim"] < ends["ddpm"] / 2
    trips = list(results["round_trip"].values())
    assert trips == sorted(trips, reverse=True)
    assert results["half_way"]["straight"] < 0.8 < results["half_way"]["slerp"]
    assert results["inpainting"]["known"] < results["inpainting"]["unknown"] / 4


def results_of_10(results: dict[str, Any]) -> None:
    assert results["closest"] < 0.3 and abs(results["dropped"] - 0.1) < 0.02
    sharpened, plain, _, guided = results["toy"].values()
    assert guided["spread"] < sharpened["spread"] and guided["mean"] > sharpened["mean"]
    assert guided["middle"] > 0.65 > 0.5 > plain["middle"]
    trade = results["trade"]
    assert list(trade) == ["0", "1", "2", "3", "5", "8", "held-out"]
    for found in trade.values():
        assert set(found) == {"accuracy", "precision", "recall", "variety", "proxy_fid"}
        assert all(m["n"] >= 12 and m["low"] <= m["value"] <= m["high"] for m in found.values())
    assert trade["0"]["accuracy"]["value"] < trade["3"]["accuracy"]["value"]
    held_out = trade["held-out"]
    assert held_out["accuracy"]["n"] == 217 and held_out["proxy_fid"]["value"] < 1000
    assert all(m["value"] < 0.6 for m in results["shuffled"].values())
    assert [len(shares) for shares in results["between"].values()] == [7, 7]
    for name in ("gap", "excess", "away"):
        assert len(results[name]) == 2


def results_of_11(results: dict[str, Any]) -> None:
    assert 0.3 < results["share_unknown"] < 1 and 0 < results["chance"] < 0.5
    for name in ("paired", "unpaired"):
        assert results[name]["group_real"]["value"] > 0.6 and results[name]["style"]["n"] >= 10
    assert results["unknown"]["known minus unknown"]["n"] >= 5 and 0 < results["dropped"] < 0.2
    assert abs(sum(results["looks"].values()) - 1) < 1e-3
    assert results["loss"][0] > results["loss"][1] > 0


def results_of_12(results: dict[str, Any]) -> None:
    rounded, guided = list(results["grid_iou"].values()), results["following"]["3"]
    assert rounded == sorted(rounded) and rounded[0] < 0.5 < 0.85 < rounded[-1]
    for key in ("objects", "filled", "empty", "found"):
        assert all(0 <= share <= 1 for kind in ("", "_shuffled") for share in guided[key + kind])
        assert results["real"][key][0] >= 0.6
    assert results["mirrored"]["mirrored"][1] > results["mirrored"]["forgotten"][2]
    assert results["loss"][1] < results["loss"][0] and len(results["attention"]) == 3
    rows = results["slope"], *results["gaps"].values(), *results["edits"].values()
    for value, low, high in rows:
        assert low <= value <= high


def results_of_13(results: dict[str, Any]) -> None:
    listens = results["listens"]
    assert listens["its own y"]["value"] > listens["another's y"]["value"] + 3
    assert listens["bicubic, its own"]["n"] >= 12 and len(results["table"]) == 25
    guided = results["guided"]
    assert set(guided) == {"bicubic", "concatenation", "guided, squares", "guided, features"}
    assert results["seconds_a_picture"]["features"] > results["seconds_a_picture"]["concatenation"]
    assert results["shares"]["a coin (simulated)"]["n"] >= 12 and len(results["loss"]) == 2
    assert results["lost"]["bicubic"]["value"] < 0 and len(results["pushed"]) == 2


def results_of_14(results: dict[str, Any]) -> None:
    toy = results["toy"]
    assert max(toy["blending"]) < 0.75 < toy["RePaint"][-1] < 1 and toy["rho"] == 0.9
    assert set(results["evaluated"]) == {"strokes", "boxes", "halves"}
    for found in results["evaluated"].values():
        own, anew = (found["model"]["measured"][key] for key in ("kept", "kept_shuffled"))
        assert own["value"] > anew["value"] and own["n"] == results["n"]
    told = results["told"]
    assert told["the truth"]["value"] > told["wrong polarity"]["value"]
    share = results["attention"]["share"]
    assert share == sorted(share) and len(results["attention"]["time"]) >= 2


def results_of_15(results: dict[str, Any]) -> None:
    judged = {name: found["value"] for name, found in results["semantic"].items()}
    for key in ("pixels", "iou"):
        assert judged[f"{key}_real"] > judged[key] > judged[f"{key}_shuffled"] > 0
    edited = results["edited"]
    assert edited["after"]["value"] > edited["new ground, before"]["value"]
    assert results["seams"]["tile by tile"]["value"] > results["seams"]["in one pass"]["value"]
    assert set(results["large"]) >= {"64 px, as trained", "256 px, objects four times larger"}
    assert results["sr"]["each alone"]["value"] > 0
    assert results["photos"]["first stage alone"]["value"] > 10
    shares = list(results["within"].values())
    assert shares == sorted(shares) and shares[-1] > 0.99
    assert max(results["flops"]) < 1.6 and min(results["losses"]) > 0
    assert len(results["moved"]) == 2


def results_of_17(results: dict[str, Any]) -> None:
    truth, narrow = results["toy"].values()
    assert narrow[0] < truth[0] and truth[-1] < narrow[-1] and truth == sorted(truth, reverse=True)
    assert set(results["kids"]) >= {"pixels", "block 4", "block 10", "head"}
    far = {name: found["value"] for name, found in results["blind"].items()}
    assert far["copies"] < far["held-out"] and results["ring"][0] < 0.05 < results["ring"][1] < 0.4
    treated = {name: found["value"] for name, found in results["treated"].items()}
    assert 0 < treated["bicubic, Pillow"] < treated["nearest"] < treated["JPEG, quality 75"]
    assert results["nearer"]["copies"] == 1 and results["tones"] == 0
    assert len(results["plane"]) == 7 and len(results["attack"]) == 5
    for found in (*results["shares"].values(), results["attack"]):
        assert all(0 <= m["low"] <= m["value"] <= m["high"] <= 1 for m in found.values())
    assert all(len(found) == 12 for found in results["well"].values())


def results_of_18(results: dict[str, Any]) -> None:
    assert results["models"] == 14 and results["tensors"] > 300 and results["times"] == 20
    assert set(results["real"].values()) <= {True, False} and len(results["real"]) == 5
    assert 1400 < results["millions"]["txt2img-1p4B"] < 1500


def results_of_16(results: dict[str, Any]) -> None:
    bound, *_ = (v for k, v in results["own_proxy_fid"].items() if k.endswith("first stage"))
    assert 0 < bound < 2e4 and len(results["own_proxy_fid"]) == 3
    assert results["best_at_equal_steps"]["2000"] in (2, 4, 8)
    assert results["ratios"]["training, pictures a second"] > 2


def results_of_19(results: dict[str, Any]) -> None:
    same, *others = results["apart"].values()
    assert same < 1e-14 < 0.05 < min(others) and len(others) == 2
    assert 0 < results["weights_apart"] < 1e-2  # of the way that they went
    assert set(results["states"]) == {"was done"}
    few, *_, many = results["accuracy"].values()
    assert 0 <= few <= many <= 1


def results_of_20(results: dict[str, Any]) -> None:
    ends = {name: found[-1] for name, found in results["spread"].items()}
    assert 1.01 > ends["zero terminal SNR"] > 0.97 > ends["this paper's"] > 0.7
    assert 0 < ends["Stable Diffusion's"] < 0.3
    first, second = results["missed"].values()
    assert first > 0.2 > 1e-9 > second
    for gaps in results["own"].values():
        assert gaps == sorted(gaps, reverse=True) and gaps[-1] > 0
    assert [len(found) for found in results["verdicts"].values()] == [5, 5]
    zero, by_class, v = results["errors"].values()
    assert zero > 0.8 and abs(by_class - v) < 0.03
    calls = [round(found["calls"]["value"]) for found in results["guidance"].values()]
    assert calls[0] == 20 < calls[2] < calls[1] == 40


RESULTS: dict[str, Callable[[dict[str, Any]], None]] = {
    "00_quickstart": results_of_00,
    "01_perceptual_and_semantic_compression": results_of_01,
    "02_autoencoder_kl": results_of_02,
    "03_vector_quantisation": results_of_03,
    "04_perceptual_and_adversarial_losses": results_of_04,
    "05_choosing_f_first_stage": results_of_05,
    "06_diffusion_step_by_step": results_of_06,
    "07_unet": results_of_07,
    "08_latent_diffusion": results_of_08,
    "09_samplers": results_of_09,
    "10_class_conditional_and_guidance": results_of_10,
    "11_text_to_image": results_of_11,
    "12_layout_to_image": results_of_12,
    "13_super_resolution": results_of_13,
    "14_inpainting": results_of_14,
    "15_semantic_synthesis_and_large_pictures": results_of_15,
    "16_downsampling_factor": results_of_16,
    "17_evaluation": results_of_17,
    "18_official_checkpoints": results_of_18,
    "19_scaling_out": results_of_19,
    "20_beyond": results_of_20,
}
