"""The card of a trained model: its facts, where it is written, and that it goes along to the hub (a fake one)."""

from pathlib import Path
from types import SimpleNamespace

import pytest
from datasets import Dataset
from huggingface_hub import ModelCard
from tiny import make_llama, make_rows, make_tokenizer
from tiny_runs import make_lora, tiny_config, tiny_trainer
from transformers import TrainerCallback

from fastdpo import DPOTrainer, SFTConfig, SFTTrainer

ROWS = make_rows(5, seed=1)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "my-model"
    model = make_llama()
    model.config._name_or_path = "someone/base"
    fast = tiny_trainer(
        folder,
        model,
        ref_model=make_llama(seed=7),
        eval_dataset=ROWS,
        label_smoothing=0.1,
        save_strategy="steps",
        save_steps=3,
    )
    fast.train()
    fast.evaluate()
    fast.save_model()
    return fast


def test_its_metadata_and_facts_are_those_of_the_run(trained):
    card = ModelCard.load(f"{trained.args.output_dir}/README.md")
    assert card.data.base_model == "someone/base"
    assert card.data.library_name == "transformers"
    assert card.data.tags == ["fastdpo", "dpo"]
    assert card.data.model_name == "my-model"
    for fact in (
        "| loss | sigmoid |",
        "| beta | 0.5 |",
        "| label_smoothing | 0.1 |",
        "| reference | frozen: ref_model was given |",
        "| train data | kept 16 of 16 pairs |",
        "| optimizer steps | 3 of 4 rows each, 0.75 epochs |",
        "| precision | float32 |",
        "- transformers ",
    ):
        assert fact in card.text, fact
    last = [entry for entry in trained.state.log_history if "eval_loss" in entry][-1]
    assert f" {last['eval_loss']:.4f} |" in card.text
    assert "## Warnings of training" in card.text
    assert trained.watch.given["reference_is_not_the_start"] in card.text


def test_the_code_that_it_shows_loads_the_model(trained, monkeypatch):
    text = ModelCard.load(f"{trained.args.output_dir}/README.md").text
    code = text.split("```python\n")[1].split("```")[0].replace("path/to/this/folder", trained.args.output_dir)
    names = {}
    exec(code, names)
    assert names["model"].num_parameters() == trained.model.num_parameters()


def test_it_is_written_with_every_checkpoint_and_where_the_model_is_saved(tmp_path):
    fast = tiny_trainer(tmp_path / "run", save_strategy="steps", save_steps=1, max_steps=1)
    fast.train()
    assert (tmp_path / "run" / "README.md").exists()
    fast.save_model(str(tmp_path / "elsewhere"))
    assert "# elsewhere" in (tmp_path / "elsewhere" / "README.md").read_text()


def test_it_is_there_when_a_users_callback_hears_of_a_checkpoint(tmp_path):
    found = []

    class Reader(TrainerCallback):
        def on_save(self, args, state, control, **kwargs):
            text = Path(args.output_dir, "README.md").read_text(encoding="utf-8")
            found.append((state.global_step, f"| optimizer steps | {state.global_step} of" in text))

    tiny_trainer(tmp_path, callbacks=[Reader()], save_strategy="steps", save_steps=1, max_steps=2).train()
    assert found == [(1, True), (2, True)]


def test_a_subclass_writes_a_card_of_its_own(tmp_path):
    class OwnCard(DPOTrainer):
        def create_model_card(self, *args, **metadata):
            Path(self.args.output_dir, "README.md").write_text("my card")

    saving = {"save_strategy": "steps", "save_steps": 1, "max_steps": 1}
    OwnCard(
        make_llama(), args=tiny_config(tmp_path, **saving), train_dataset=ROWS, processing_class=make_tokenizer()
    ).train()
    assert (tmp_path / "README.md").read_text() == "my card"


def test_arguments_of_create_model_card_are_trls(trained):
    trained.create_model_card("A name", "someone/pairs", ["extra"], license="mit")
    card = ModelCard.load(f"{trained.args.output_dir}/README.md")
    assert card.data.model_name == "A name"
    assert card.data.datasets == "someone/pairs"
    assert card.data.tags == ["fastdpo", "dpo", "extra"]
    assert card.data.license == "mit"
    assert "on someone/pairs with fastdpo" in card.text


def test_transformers_names_of_metadata_are_taken(trained):
    trained.create_model_card(finetuned_from="someone/else", dataset="someone/pairs", language="en")
    card = ModelCard.load(f"{trained.args.output_dir}/README.md")
    assert card.data.base_model == "someone/else"
    assert card.data.datasets == "someone/pairs"
    assert card.data.language == "en"


def test_paths_of_this_machine_stay_out_of_it(tmp_path):
    model = make_llama()
    model.config._name_or_path = str(tmp_path / "models" / "base")
    (tmp_path / "models" / "base").mkdir(parents=True)
    fast = tiny_trainer(tmp_path / "run", model, reference="cached", ref_cache_dir=str(tmp_path / "cache"))
    fast.dataset_name = "pairs.jsonl"
    fast.save_model()
    text = (tmp_path / "run" / "README.md").read_text()
    assert str(tmp_path) not in text
    assert "`base`, trained by" in text
    assert "| reference | cached: asked for; train" in text
    assert ModelCard.load(str(tmp_path / "run" / "README.md")).data.base_model is None
    assert "datasets:" not in text


def test_an_adapters_card_says_so(tmp_path):
    fast = tiny_trainer(tmp_path, peft_config=make_lora())
    fast.save_model()
    card = ModelCard.load(str(tmp_path / "README.md"))
    assert card.data.library_name == "peft"
    assert "lora" in card.data.tags
    assert "AutoPeftModelForCausalLM" in card.text
    assert "| adapter | LORA, r = 4, alpha = 8 |" in card.text


def test_sft_has_a_card_too(tmp_path):
    arguments = {"report_to": "none", "use_cpu": True, "max_steps": 1, "disable_tqdm": True}
    dataset = Dataset.from_list(make_rows(4))
    SFTTrainer(
        make_llama(),
        SFTConfig(str(tmp_path), **arguments),
        train_dataset=dataset,
        processing_class=make_tokenizer(),
    ).save_model()
    assert ModelCard.load(str(tmp_path / "README.md")).data.tags == ["fastdpo", "sft"]


class FakeHub:
    """Keeps what is uploaded: the arguments, and the files of the run's folder at that moment, by name."""

    def __init__(self, folder, monkeypatch):
        self.folder, self.uploads = folder, []
        monkeypatch.setattr("transformers.trainer.hf_api", lambda: self)

    def create_repo(self, name, **_):
        return SimpleNamespace(repo_id=f"someone/{name}")

    def upload_folder(self, **arguments):
        files = {path.name: path.read_bytes() for path in self.folder.iterdir() if path.is_file()}
        self.uploads.append((arguments, files))
        return SimpleNamespace(done=lambda: True, result=lambda: None)


def test_push_to_hub_uploads_model_and_card(tmp_path, monkeypatch):
    hub = FakeHub(tmp_path / "run", monkeypatch)
    fast = tiny_trainer(tmp_path / "run", max_steps=1)
    fast.train()
    fast.push_to_hub(dataset_name="someone/pairs", tags="extra")
    [(arguments, files)] = hub.uploads
    assert arguments["repo_id"] == "someone/run"
    assert arguments["folder_path"] == str(tmp_path / "run")
    assert {"model.safetensors", "config.json", "tokenizer.json", "README.md"} <= set(files)
    text = files["README.md"].decode()
    assert 'from_pretrained("someone/run")' in text
    assert "- extra" in text


def test_every_checkpoint_that_is_pushed_has_the_card_of_its_step(tmp_path, monkeypatch):
    hub = FakeHub(tmp_path / "run", monkeypatch)
    saving = {"save_strategy": "steps", "save_steps": 1, "max_steps": 2}
    tiny_trainer(tmp_path / "run", push_to_hub=True, hub_always_push=True, **saving).train()
    cards = [files["README.md"].decode() for _, files in hub.uploads[:2]]
    for step, card in enumerate(cards, start=1):
        assert f"| optimizer steps | {step} of 4 rows each" in card
