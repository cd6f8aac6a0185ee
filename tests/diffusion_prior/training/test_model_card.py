import json

from diffusion_prior.training.model_card import Stage, write_model_card


def test_card_tells_data_steps_losses_figures_and_licence(pairs, tiny_prior, tmp_path):
    lines = [{"step": step, "seconds": 6.0 * step, "learning_rate": 1e-3, "loss": 1.0 / step} for step in range(1, 11)]
    lines += [{"step": 10, "seconds": 60.0, "render/psnr": 12.0, "enhanced/psnr": 14.25}]
    (tmp_path / "log.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
    write_model_card(tmp_path / "MODEL_CARD.md", tiny_prior, [Stage("std", tmp_path)], pairs)
    card = (tmp_path / "MODEL_CARD.md").read_text()
    assert "8 pairs of render and photograph from 2 runs of sparse splats over 2 scenes" in card
    assert "| beer | 1 | 4 |" in card
    assert "10 steps, 1.0 minutes" in card
    assert "| loss | 1 | 0.1 |" in card
    assert "| step | render/psnr | enhanced/psnr |" in card
    assert "| 10 | 12 | 14.25 |" in card
    assert "research use" in card


def test_losses_of_two_players_are_told_apart_from_figures(pairs, tiny_prior, tmp_path):
    lines = [{"step": 1, "seconds": 1.0, "std/loss": 2.0, "discriminator/loss": 3.0}]
    (tmp_path / "log.jsonl").write_text(json.dumps(lines[0]))
    write_model_card(tmp_path / "MODEL_CARD.md", tiny_prior, [Stage("std", tmp_path)], pairs)
    card = (tmp_path / "MODEL_CARD.md").read_text()
    assert "| discriminator/loss | 3 | 3 |" in card
    assert "Validation" not in card


def test_a_loss_that_belongs_to_some_of_the_steps_has_the_mean_of_those(pairs, tiny_prior, tmp_path):
    lines = [{"step": 1, "seconds": 1.0, "loss": 2.0, "gated_l2": 3.0}, {"step": 2, "seconds": 2.0, "loss": 4.0}]
    (tmp_path / "log.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
    write_model_card(tmp_path / "MODEL_CARD.md", tiny_prior, [Stage("coarse", tmp_path)], pairs)
    card = (tmp_path / "MODEL_CARD.md").read_text()
    assert "| gated_l2 | 3 |  |" in card
