"""Members of a population are what runs of their own would be."""

from functools import partial

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from small import quiet_trainer

from lit_resnorm.data import Digits
from lit_resnorm.data.labelled import flipped_labels
from lit_resnorm.modules import LitMLP, LitResNetBN, LitSkipInit
from lit_resnorm.population import Population

MEMBERS = [{"seed": 0}, {"seed": 1, "lr": 0.01}, {"seed": 2}, {"seed": 3, "lr": 0.01}]


class Doubles(Digits):
    """Digits in float64, so that equality is that of the arithmetic."""

    def splits(self):
        sets = super().splits()
        for examples in sets:
            examples.x = examples.x.double()
        return sets


def data(**options):
    return Doubles(num_train=96, num_val=40, batch_size=16, **options)


def optimizer(kind):
    if kind == "sgd":
        return partial(torch.optim.SGD, lr=0.02, momentum=0.9)
    return partial(torch.optim.AdamW, lr=0.02)


def make(net=LitResNetBN, kind="sgd", **options):
    return net(3, 16, optimizer=optimizer(kind), **options).double()


def fit(module, steps=30, datamodule=None, **options):
    trainer = quiet_trainer(max_steps=steps, **options)
    trainer.fit(module, datamodule or data())
    return trainer


def alone(member, steps=30, datamodule=None, net=LitResNetBN, kind="sgd", **options):
    torch.manual_seed(member["seed"])
    module = make(net, kind)
    for_rate = member.get("lr")
    if for_rate is not None:
        module.optimizer = partial(module.optimizer, lr=for_rate)
    fit(module, steps, datamodule, **options)
    return module.state_dict()


def assert_member_is(population, i, state):
    own = population.member_state_dict(i)
    assert own.keys() == state.keys()
    for name, value in state.items():
        torch.testing.assert_close(own[name], value, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("net", [LitMLP, LitResNetBN, LitSkipInit])
@pytest.mark.parametrize("kind", ["sgd", "adamw"])
def test_members_equal_runs_of_their_own_seed_and_rate(net, kind):
    population = Population(partial(make, net, kind), MEMBERS)
    fit(population, gradient_clip_val=0.5)
    for i in (0, 1, 3):
        state = alone(MEMBERS[i], net=net, kind=kind, gradient_clip_val=0.5)
        assert_member_is(population, i, state)


def test_members_with_schedule_and_accumulation_equal_runs_of_their_own():
    schedule = partial(torch.optim.lr_scheduler.ExponentialLR, gamma=0.5)
    whole = partial(make, lr_scheduler=schedule)
    population = Population(whole, MEMBERS[:2])
    fit(population, 12, accumulate_grad_batches=2)
    torch.manual_seed(1)
    module = whole()
    module.optimizer = partial(module.optimizer, lr=0.01)
    fit(module, 12, accumulate_grad_batches=2)
    assert_member_is(population, 1, module.state_dict())


def test_member_with_label_noise_equals_a_run_on_the_noisy_labels():
    class Noisy(Doubles):
        def splits(self):
            sets = super().splits()
            sets[0].y = flipped_labels(sets[0].y, 0.3, 10, 1)
            return sets

    members = [{"seed": 0}, {"seed": 1, "label_noise": 0.3}]
    population = Population(make, members)
    fit(population, datamodule=data(with_index=True))
    noisy = Noisy(num_train=96, num_val=40, batch_size=16)
    assert_member_is(population, 1, alone(members[1], datamodule=noisy))
    assert_member_is(population, 0, alone(members[0]))


def test_diverging_member_keeps_its_weights_while_the_others_go_on():
    members = [{"seed": 0}, {"seed": 1, "lr": 1e200}]
    population = Population(partial(make, LitMLP), members)
    with pytest.warns(UserWarning, match=r"members \[1\] diverged at step 1"):
        trainer = fit(population)
    assert population.diverged.tolist() == [False, True]
    assert trainer.global_step == 30
    assert trainer.callback_metrics["population/diverged"] == 1
    assert_member_is(population, 0, alone(members[0], net=LitMLP))
    frozen = alone(members[1], steps=1, net=LitMLP)
    assert_member_is(population, 1, frozen)


def test_training_ends_where_all_members_have_diverged():
    members = [{"lr": 1e200}, {"lr": 1e201}]
    population = Population(partial(make, LitMLP), members)
    with pytest.warns(UserWarning, match=r"members \[0, 1\] diverged"):
        trainer = fit(population)
    assert trainer.global_step < 5


def test_each_members_curves_are_logged(tmp_path):
    population = Population(make, MEMBERS)
    logger = CSVLogger(tmp_path, flush_logs_every_n_steps=1)
    trainer = fit(population, 12, logger=logger)
    text = next(tmp_path.rglob("metrics.csv")).read_text().splitlines()
    rows = [dict(zip(text[0].split(","), r.split(","), strict=True)) for r in text[1:]]
    curve = [row for row in rows if row["train/loss/03"]]
    assert [int(row["step"]) for row in curve] == [*range(12)]
    assert {f"val/accuracy/{i:02d}" for i in range(4)} < {*trainer.callback_metrics}
    mean = sum(trainer.callback_metrics[f"val/loss/{i:02d}"] for i in range(4)) / 4
    torch.testing.assert_close(trainer.callback_metrics["val/loss"], mean)


def test_validation_of_a_member_equals_that_of_its_own_run():
    population = Population(make, MEMBERS)
    trainer = fit(population)
    module = make()
    module.load_state_dict(population.member_state_dict(1))
    trainer.validate(population, data(), verbose=False)
    together = trainer.callback_metrics["val/loss/01"]
    other = quiet_trainer()
    other.validate(module, data(), verbose=False)
    torch.testing.assert_close(
        together.double(), other.callback_metrics["val/loss"].double()
    )


def test_resumed_population_ends_with_the_same_bits(tmp_path):
    whole = Population(make, MEMBERS)
    fit(whole, 20)
    checkpoint = ModelCheckpoint(tmp_path, save_last=True, every_n_train_steps=9)
    part = Population(make, MEMBERS)
    fit(part, 9, callbacks=[checkpoint], enable_checkpointing=True)
    rest = Population(make, MEMBERS)
    quiet_trainer(max_steps=20).fit(rest, data(), ckpt_path=tmp_path / "last.ckpt")
    for name, value in whole.state_dict().items():
        assert torch.equal(rest.state_dict()[name], value)


def test_making_a_population_leaves_the_random_state_alone():
    torch.manual_seed(3)
    before = torch.get_rng_state()
    Population(make, MEMBERS)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("model", "members", "message"),
    [
        (make, [], "members is empty"),
        (make(), [{}], "model is a LitResNetBN that is made already"),
        (make, [{"lr": 0.1, "leraning_rate": 1}], "leraning_rate, which SGD"),
        (make, [{"label_noise": 2.0}], "label_noise"),
        (make, [{"label_noise": 0.1}], "with_index"),
        (lambda: torch.nn.Linear(1, 1), [{}], "makes a Linear"),
        (
            partial(LitMLP, 2, 8, optimizer=torch.optim.LBFGS),
            [{"lr": 1.0}],
            "LBFGS",
        ),
    ],
)
def test_members_that_cannot_be_are_refused_with_the_reason(model, members, message):
    with pytest.raises(ValueError, match=message):
        fit(Population(model, members))


@pytest.mark.ddp
def test_two_ranks_train_the_members_that_one_trains():
    def trained(devices, batch_size):
        population = Population(partial(make, LitMLP), MEMBERS[:2])
        options = {"strategy": "ddp_fork", "devices": 2} if devices == 2 else {}
        sizes = {"num_train": 96, "num_val": 40, "batch_size": batch_size}
        fit(population, 6, Doubles(**sizes), **options)
        return population

    L.seed_everything(0, verbose=False)
    assert_member_is(trained(2, 8), 1, trained(1, 16).member_state_dict(1))
