"""What 8 bits in the decoder cost: the measure, on a small decoder."""

import pytest
import torch

from benchmarks.decoder_formats import main, measure, psnr_db
from sana_ref.autoencoder import AutoencoderDC, AutoencoderDCConfig
from sana_ref.quantized_convs import ConvRanges, conv_plan

CONFIG = AutoencoderDCConfig(
    latent_channels=4,
    encoder_block_out_channels=(8,) * 6,
    encoder_layers_per_block=(1,) * 6,
    encoder_qkv_multiscales=((),) * 6,
    decoder_block_out_channels=(8,) * 6,
    decoder_layers_per_block=(1,) * 6,
    decoder_qkv_multiscales=((),) * 6,
)


def test_psnr() -> None:
    exact = torch.tensor([-3.0, 0.0, 0.5, 1.0])
    assert psnr_db(exact + torch.tensor([0.0, 0.02, -0.02, 5.0]), exact) == pytest.approx(43.0103, abs=1e-3)  # 20 lg(100) + 3


def test_coarser_scales_cost_more() -> None:
    torch.manual_seed(2)
    decoder = AutoencoderDC(CONFIG).decoder.eval()
    latents = [torch.randn(1, 4, 2, 2)]
    with torch.inference_mode(), ConvRanges(decoder) as ranges:
        exact = [decoder(z) for z in latents]
    exact = [each / each.abs().amax() for each in exact]  # within -1 to 1, which a picture is

    class Scaled(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.decoder = decoder
            with torch.inference_mode():
                self.largest = decoder(latents[0]).abs().amax()

        def forward(self, z: torch.Tensor) -> torch.Tensor:
            return self.decoder(z) / self.largest

    decoders = {"bf16": Scaled(), "fp32": Scaled()}
    rest = ("psnr_db_rest_bf16", "psnr_db_rest_fp32")
    found = [measure(decoders, latents, conv_plan("int8", ranges.largest(), margin), exact) for margin in (1, 8)]
    assert all(found[0][name][0] > found[1][name][0] + 6 for name in rest)
    assert found[0]["lpips"] < found[1]["lpips"]


def test_a_checkpoint_that_is_not_there(capsys: pytest.CaptureFixture[str], tmp_path) -> None:  # type: ignore[no-untyped-def]
    assert main(["--model", str(tmp_path / "none")]) == 1
    assert "decoder_formats: " in capsys.readouterr().err
