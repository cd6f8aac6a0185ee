import pytest

from nerfstudio_enhancer.evaluation.methods import method_config
from nerfstudio_enhancer.schedule import fit_schedule, own_length, squeeze


def of_1500_to_3000_steps():
    config = method_config()
    config.schedule_iterations, config.few_views_iterations, config.pipeline.model.few_views = 3000, 1500, 12
    return config


@pytest.mark.parametrize(
    ("references", "steps"), [(2, 1500), (12, 1500), (18, 2250), (24, 3000), (100, 3000), (None, 3000)]
)
def test_the_length_grows_with_the_references_beyond_a_few(references, steps):
    assert own_length(of_1500_to_3000_steps(), references) == steps


def test_without_a_length_for_few_references_all_trainings_are_alike():
    config = of_1500_to_3000_steps()
    config.few_views_iterations = None
    assert own_length(config, 3) == 3000


def test_where_no_number_of_references_is_few_the_training_is_long():
    config = of_1500_to_3000_steps()
    config.pipeline.model.few_views = 0
    assert own_length(config, 3) == 3000


def test_a_squeezed_schedule_keeps_its_shares():
    config, before = of_1500_to_3000_steps(), of_1500_to_3000_steps()
    fit_schedule(config, 300)
    model, whole = config.pipeline.model, before.pipeline.model
    whole.fit_to(3000)
    assert config.max_num_iterations == 300
    assert model.enhance.start == whole.enhance.start // 10 == 100
    assert model.enhance.every == whole.enhance.every // 10 == 50
    assert model.stop_split_at == whole.stop_split_at // 10
    assert model.refine_every == whole.refine_every
    assert config.optimizers["means"]["scheduler"].max_steps == before.optimizers["means"]["scheduler"].max_steps // 10
    with pytest.raises(ValueError, match="at least 3 steps, got 2"):
        fit_schedule(config, 2)


def test_what_is_squeezed_once_is_not_squeezed_again():
    config = of_1500_to_3000_steps()
    squeeze(config, own_length(config, 3))
    assert config.pipeline.model.stop_split_at == of_1500_to_3000_steps().pipeline.model.stop_split_at // 2
    assert own_length(config, 3) == 1500


def test_when_rounds_run_stays_open():
    config = of_1500_to_3000_steps()
    config.pipeline.model.enhance.every = 700
    squeeze(config, 1500)
    assert config.pipeline.model.enhance.start is None
    assert config.pipeline.model.enhance.every == 700
