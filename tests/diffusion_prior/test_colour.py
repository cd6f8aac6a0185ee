import torch

from diffusion_prior.colour import match_first_reference


def test_two_pixels_by_hand():
    # frame 0, 1: mean 0.5, std 0.5. reference 0.2, 0.6: mean 0.4, std 0.2 -> 0.2, 0.6
    frame = torch.tensor([0.0, 1.0]).reshape(1, 1, 1, 2).expand(1, 3, 1, 2)
    reference = torch.tensor([0.2, 0.6]).reshape(1, 1, 2).expand(3, 1, 2)
    torch.testing.assert_close(match_first_reference(frame, reference)[0], reference)


def test_every_frame_takes_the_statistics_of_the_reference_channel_by_channel():
    generator = torch.Generator().manual_seed(0)
    frames = torch.rand(4, 3, 8, 9, generator=generator) * torch.tensor([0.2, 0.5, 0.9])[:, None, None]
    reference = torch.rand(3, 5, 7, generator=generator) * 0.5 + 0.3
    matched = match_first_reference(frames, reference)
    for frame in matched:
        torch.testing.assert_close(frame.mean(dim=(1, 2)), reference.mean(dim=(1, 2)))
        torch.testing.assert_close(frame.std(dim=(1, 2), correction=0), reference.std(dim=(1, 2), correction=0))


def test_the_reference_itself_is_left_alone():
    reference = torch.rand(3, 6, 6, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(match_first_reference(reference[None], reference)[0], reference)


def test_correcting_twice_is_correcting_once():
    generator = torch.Generator().manual_seed(2)
    frames, reference = torch.rand(2, 3, 6, 6, generator=generator), torch.rand(3, 6, 6, generator=generator)
    once = match_first_reference(frames, reference)
    torch.testing.assert_close(match_first_reference(once, reference), once)


def test_a_frame_of_one_colour_becomes_the_reference_mean():
    reference = torch.rand(3, 6, 6, generator=torch.Generator().manual_seed(3))
    matched = match_first_reference(torch.full((1, 3, 6, 6), 0.7), reference)
    torch.testing.assert_close(matched[0, :, 0, 0], reference.mean(dim=(1, 2)), atol=1e-2, rtol=0)
