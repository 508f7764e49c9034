"""The training of the bundled models: its shortcuts compute what the models themselves compute."""

import random

import pytest
import torch
from torch import nn

from tests.reference import relative_error
from tools.family import denoise, text, vae
from tools.family.muon import Both, orthogonal
from wan_core import bundled
from wan_core.conditioning.text import Tokenizer
from wan_core.models.dit import WanDiT
from wan_core.models.text_encoder import UMT5Encoder
from wan_core.models.vae import WanVAE
from wan_core.types import Conditioning
from wancore.trainer.data.synthetic import COLOURS, GROUNDS, LANGUAGES, MOTIONS, Scene


@pytest.fixture(scope="module")
def autoencoder() -> WanVAE:
    torch.manual_seed(0)
    made = WanVAE(bundled.VAE)
    vae.initialise(made)
    for parameter in made.parameters():
        if parameter.ndim > 1:
            parameter.data += 0.05 * parameter.std() * torch.randn_like(parameter)
    return made.requires_grad_(False)


@pytest.fixture(scope="module")
def clips() -> torch.Tensor:
    return vae.pixels_of([Scene.random(seed).drawn(32, 32, 9).video for seed in range(3)])


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    bundled.write_tokenizer(folder / bundled.TOKENIZER_FILE, text.english_words(), text.chinese_pieces())
    return Tokenizer.from_folder(folder)


def test_clips_are_trained_on_as_they_are_streamed(autoencoder, clips):
    geometry = autoencoder.config.geometry
    mean, std = (torch.tensor(values).view(1, -1, 1, 1, 1) for values in (geometry.mean, geometry.std))
    raw = vae.encode(autoencoder, clips)
    assert relative_error((raw - mean) / std, autoencoder.encode(clips)) < 1e-5
    pixels = vae.decode(autoencoder, raw).clamp(-1, 1)
    assert relative_error(pixels, autoencoder.decode((raw - mean) / std)) < 1e-5


def test_latents_get_the_published_mean_and_deviation_and_show_the_same(autoencoder, clips):
    numbers = [clip.permute(1, 2, 3, 0).add(1).mul(127.5).round().to(torch.uint8).numpy() for clip in clips]
    weights = vae._with_unit_latents(autoencoder, dict(autoencoder.state_dict()), numbers)
    folded = WanVAE(bundled.VAE).requires_grad_(False)
    folded.load_state_dict(weights)
    latents = folded.encode(vae.pixels_of(numbers))
    assert latents.mean((0, 2, 3, 4)).abs().max() < 1e-3
    assert (latents.std((0, 2, 3, 4)) - 1).abs().max() < 1e-3
    before = vae.decode(autoencoder, vae.encode(autoencoder, clips)).clamp(-1, 1)
    assert relative_error(folded.decode(latents), before) < 1e-3


def test_one_row_of_zeros_stands_for_all_of_them():
    torch.manual_seed(0)
    dit = WanDiT(bundled.DIT).requires_grad_(False)
    denoise.initialise(dit)
    for parameter in dit.parameters():
        parameter.data += 0.02 * torch.randn_like(parameter)
    x, lengths = torch.randn(3, 16, 2, 4, 6), torch.tensor([3, 7, 5])
    rows = torch.zeros(3, denoise.MAX_TOKENS, dit.config.text_dim)
    for row, length in zip(rows, lengths, strict=True):
        row[:length] = torch.randn(length, dit.config.text_dim)
    timesteps = torch.tensor([900.0, 400.0, 50.0])
    short = denoise.velocity(dit, x, timesteps, rows[:, :9], lengths)
    assert relative_error(short, dit(x, timesteps, Conditioning(text=rows))) < 1e-5


def test_a_caption_is_labelled_by_what_it_says():
    r = random.Random(0)
    words = {"colour": [row[1] for row in COLOURS.values()], "motion": list(MOTIONS.values())}
    words["ground"] = [ground.words for ground in GROUNDS.values()]
    hidden = 0
    for _ in range(300):
        caption = text.draw_caption(r)
        labels = dict(zip(text.ATTRIBUTES, caption.labels, strict=True))
        for name, table in words.items():
            if labels[name] == len(text.ATTRIBUTES[name]):
                hidden += 1
            else:
                word = table[labels[name]]
                # A word that means nothing may stand between those of a phrase.
                said = [all(part in caption.text for part in one.split()) for one in (*word.english, *word.chinese)]
                assert any(said), caption
    assert hidden > 20


def test_the_tokenizer_knows_every_word_of_a_caption(tokenizer):
    unknown = 2
    for seed in range(40):
        for language in LANGUAGES:
            assert unknown not in tokenizer.ids(Scene.random(seed).caption(seed, language), 512).tolist()
    assert tokenizer.vocab_size <= bundled.TEXT_ENCODER.vocab_size


def test_rows_of_text_are_those_of_the_text_encoder(tokenizer):
    torch.manual_seed(0)
    encoder = UMT5Encoder(bundled.TEXT_ENCODER).requires_grad_(False)
    text._initialise(encoder)
    texts = ["a red ball grows", "蓝天", "the box spins slowly on green grass"]
    rows, lengths = denoise.text_rows(encoder, tokenizer, texts)
    for row, length, one in zip(rows, lengths, texts, strict=True):
        ids, mask = tokenizer([one], 512)
        assert relative_error(row[:length], encoder(ids, mask)[0]) < 1e-5 and not row[length:].any()


def test_a_step_has_one_size_in_every_direction_and_goes_down():
    torch.manual_seed(0)
    values = torch.linalg.svdvals(orthogonal(torch.randn(24, 40)))
    assert 0.5 < values.min() <= values.max() < 1.4
    net, x = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(32, 4)), torch.randn(16, 3, 4, 4)
    target, optimizer, losses = torch.randn(16, 4), Both(net, 5e-2), []
    for step in range(60):
        loss = (net(x) - target).square().mean()
        losses.append(loss.item())
        optimizer.step(loss, step / 60)
    assert losses[-1] < 0.3 * losses[0]
    assert optimizer.averaged(net).keys() == net.state_dict().keys()
