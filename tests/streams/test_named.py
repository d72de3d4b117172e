"""The listed streams: each is read from small files in its real format, and says what it lacks."""

from __future__ import annotations

import hashlib
import tarfile
from pathlib import Path

import numpy as np
import pytest
from stream_fixtures import (
    DOMAINNET,
    FIXTURES,
    SESSIONS,
    TEST,
    TRAIN,
    WNIDS,
    counts,
    red,
    save,
    write_cifar,
    write_core50,
    write_cub,
    write_domainnet,
    write_imagenet_r,
    write_office_home,
    write_parts,
    write_split_lists,
    write_tiny_imagenet,
)

from duallora import streams
from duallora.errors import DualLoRAError


def colours(view: streams.TaskDataset) -> list[tuple[int, int]]:
    """Class and part that the pixels tell, up to what JPEG does to them."""
    pixels = [np.asarray(view[i][0].convert("RGB"))[0, 0].astype(int) for i in range(len(view))]
    return [(round((r - red(0)) / 20), TEST if g > 127 else TRAIN) for r, g, _ in pixels]


def load_small(name: str, data: Path, monkeypatch: pytest.MonkeyPatch, **options: object) -> streams.Stream:
    small = FIXTURES[name]  # a listed stream without a fixture fails here
    stream = small.write(data, monkeypatch) or name
    if not small.domains and "tasks" not in options and len(small.classes) < streams.STREAMS[name].tasks:
        options["tasks"] = 2
    return streams.load(stream, data=data, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("place", ["vtab-cil/vtab", "vtab/vtab-cil/vtab", "vtab/vtab", "vtab"])
def test_vtab_is_found_with_and_without_its_top_folders(place: str, tmp_path: Path) -> None:
    write_parts(tmp_path / place, FIXTURES["vtab"].classes)
    assert streams.STREAMS["vtab"].find(tmp_path) == tmp_path / place


class TestEveryStream:
    @pytest.mark.parametrize("name", list(streams.STREAMS))
    def test_it_is_read_from_files_of_its_format(
        self, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        small = FIXTURES[name]
        stream = load_small(name, tmp_path, monkeypatch)
        assert sorted(stream.class_order) == list(small.classes)
        assert counts(stream) == (small.train, small.test)
        assert [task.name for task in stream] == (
            list(small.domains) or [f"task {i + 1}" for i in range(len(stream))]
        )
        for task in stream:
            for view, green in ((task.train, TRAIN), (task.test, TEST)):
                assert len(set(view.identifiers)) == len(view)
                assert view[0][1] == view.targets[0]
                if not small.coloured:
                    continue
                named = [small.classes.index(view.classes[target]) for target in view.targets]
                found = colours(view)
                assert [target for target, _ in found] == named
                assert not small.official or {part for _, part in found} == {green}
        if not small.official:
            taught = {name for task in stream for name in task.train.identifiers}
            assert not taught & {name for task in stream for name in task.test.identifiers}

    @pytest.mark.parametrize("name", list(streams.STREAMS))
    def test_holdout_takes_the_test_images_from_the_training_images(
        self, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        small = FIXTURES[name]
        stream = load_small(name, tmp_path, monkeypatch, holdout=1, train_per_class=1)
        for task in stream:
            assert len(task.train) == len(task.train.classes)
            assert len(task.test) >= len(task.train)
            if small.official and small.coloured:
                assert {part for _, part in colours(task.test)} == {TRAIN}

    @pytest.mark.parametrize(
        "name", [name for name, entry in streams.STREAMS.items() if entry.folder and "cifar" not in name]
    )
    def test_what_is_missing_is_to_be_fetched_and_put_somewhere(self, name: str, tmp_path: Path) -> None:
        entry = streams.STREAMS[name]
        with pytest.raises(DualLoRAError) as caught:
            streams.load(name, data=tmp_path / "sets")
        text = str(caught.value)
        for word in (entry.files, entry.page, "--data", f"duallora streams {name}"):
            assert word in text
        assert str(tmp_path / "sets" / entry.folder) in text
        assert "\n" not in text
        assert not (tmp_path / "sets").exists()

    @pytest.mark.parametrize("name", [name for name, small in FIXTURES.items() if small.domains])
    def test_domains_are_pooled_on_request(
        self, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        small = FIXTURES[name]
        stream = load_small(name, tmp_path, monkeypatch, scenario="class", tasks=3)
        assert stream.name.endswith("(classes)")
        assert counts(stream) == (small.train, small.test)
        assert sorted(name for task in stream for name in task.train.classes) == list(small.classes)
        for task in stream:
            assert [t for t, _ in colours(task.train)] == [
                small.classes.index(task.train.classes[target]) for target in task.train.targets
            ]


class TestCifar:
    def test_a_missing_one_is_fetched_or_said_to_be_missing(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from torchvision import datasets

        monkeypatch.setattr(datasets.CIFAR100, "url", "http://127.0.0.1:9/cifar-100-python.tar.gz")
        with pytest.raises(DualLoRAError, match=r"cifar-100-python\.tar\.gz .*--data.*streams cifar100") as e:
            streams.load("cifar100", data=tmp_path / "new" / "data")
        assert "refused" in str(e.value)
        assert list(tmp_path.iterdir()) == []

    def test_the_archive_alone_will_do(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        from torchvision import datasets

        folder = write_cifar(tmp_path / "made", monkeypatch, "cifar100")
        archive = tmp_path / "data" / "cifar100" / "cifar-100-python.tar.gz"
        archive.parent.mkdir(parents=True)
        with tarfile.open(archive, "w:gz") as tar:
            tar.add(folder, folder.name)
        monkeypatch.setattr(datasets.CIFAR100, "tgz_md5", hashlib.md5(archive.read_bytes()).hexdigest())
        monkeypatch.setattr(datasets.CIFAR100, "url", "http://127.0.0.1:9/never")
        stream = streams.load("cifar100", tasks=5, data=tmp_path / "data")
        assert counts(stream) == (60, 20)

    def test_damaged_files_are_not_unpickled(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        folder = write_cifar(tmp_path, monkeypatch, "cifar10")
        (folder / "data_batch_3").write_bytes(b"cos\nsystem\n(S'echo unpickled'\ntR.")
        with pytest.raises(DualLoRAError, match="published checksums: remove it and unpack cifar-10-python"):
            streams.load("cifar10", data=tmp_path)

    def test_files_beside_the_other_data_sets_are_found(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        folder = write_cifar(tmp_path, monkeypatch, "cifar100")
        folder.rename(tmp_path / folder.name)
        assert len(streams.load("cifar100", tasks=2, data=tmp_path)) == 2


class TestImageNetR:
    def test_the_public_lists_decide(self, tmp_path: Path) -> None:
        write_imagenet_r(tmp_path)
        lists = write_split_lists(tmp_path / "lists")
        stream = streams.load("imagenet-r", tasks=2, data=tmp_path, split_lists=lists, order="alphabetical")
        assert stream.name == "imagenet-r (split lists, 28 + 12)"
        assert stream.class_order == WNIDS
        assert stream.tasks[0].test.identifiers == [
            f"{wnid}/{file}" for wnid in WNIDS[:2] for file in ("art_0.jpg", "cartoon_1.jpg", "sketch_2.jpg")
        ]

    def test_a_repacked_archive_is_matched_by_wnid_and_file(self, tmp_path: Path) -> None:
        write_imagenet_r(tmp_path)
        plain = streams.load("imagenet-r", tasks=2, data=tmp_path)
        root = tmp_path / "imagenet-r"
        for wnid in WNIDS:
            for i, file in enumerate(sorted((root / wnid).iterdir())):
                target = root / ("test" if i < 4 else "train") / wnid / file.name
                target.parent.mkdir(parents=True, exist_ok=True)
                file.rename(target)
            (root / wnid).rmdir()
        as_found = streams.load("imagenet-r", tasks=2, data=tmp_path)
        assert as_found.name == "imagenet-r (train/ and test/ as found)"
        assert counts(as_found) == (24, 16)
        lists = write_split_lists(tmp_path / "lists")
        listed = streams.load("imagenet-r", tasks=2, data=tmp_path, split_lists=lists)
        assert counts(listed) == (28, 12)
        assert plain.name == "imagenet-r (seeded 80/20 split)"

    def test_the_seeded_split_is_the_same_everywhere_and_of_each_class(self, tmp_path: Path) -> None:
        write_imagenet_r(tmp_path)
        stream = streams.load("imagenet-r", tasks=1, data=tmp_path, order="alphabetical")
        assert stream.tasks[0].test.identifiers == [
            "n01443537/cartoon_4.jpg",
            "n01443537/sketch_8.jpg",
            "n01484850/cartoon_1.jpg",
            "n01484850/cartoon_4.jpg",
            "n02056570/art_3.jpg",
            "n02056570/sketch_5.jpg",
            "n09472597/cartoon_4.jpg",
            "n09472597/sketch_5.jpg",
        ]
        half = streams.load("imagenet-r", tasks=1, classes=2, data=tmp_path)
        assert sorted(half.tasks[0].test.identifiers) == stream.tasks[0].test.identifiers[:4]

    def test_bad_lists_are_named(self, tmp_path: Path) -> None:
        write_imagenet_r(tmp_path)
        lists = write_split_lists(tmp_path / "lists")
        test = lists / "imagenet-r_test.yaml"

        def refused(match: str) -> None:
            with pytest.raises(DualLoRAError, match=match):
                streams.load("imagenet-r", tasks=2, data=tmp_path, split_lists=lists)

        good = test.read_text()
        test.write_text(good.replace("art_0", "art_77"))
        refused(r"names 4 of 12 images that are not in .*n01443537/art_77\.jpg: unpack")
        test.write_text((lists / "imagenet-r_train.yaml").read_text())
        refused("28 images in common")
        test.write_text("data: 3")
        refused("no list `data`")
        test.write_text("data: [")
        refused("not a readable YAML file")
        test.unlink()
        refused(r"imagenet-r_test\.yaml does not exist: put .* into one folder")

    def test_a_folder_without_wordnet_ids_is_refused(self, tmp_path: Path) -> None:
        save(tmp_path / "imagenet-r" / "goldfish" / "a.jpg", 0)
        with pytest.raises(DualLoRAError, match="no folders of images named by a WordNet id"):
            streams.load("imagenet-r", data=tmp_path)

    def test_other_streams_take_no_lists(self, tmp_path: Path) -> None:
        with pytest.raises(DualLoRAError, match="digits has no published lists"):
            streams.load("digits", split_lists=tmp_path)


class TestListFiles:
    """Lists that do not fit the images are refused; who made the archive knows why."""

    def test_tiny_imagenet(self, tmp_path: Path) -> None:
        write_tiny_imagenet(tmp_path)
        root = tmp_path / "tiny-imagenet" / "tiny-imagenet-200"
        annotations = root / "val" / "val_annotations.txt"
        good = annotations.read_text()
        annotations.write_text(good + "val_9.JPEG\tn00000000\t0\t0\t1\t1\n")
        with pytest.raises(DualLoRAError, match=r"line 9 of .* has no file and class"):
            streams.load("tiny-imagenet", data=tmp_path)
        annotations.write_text(good + "val_9.JPEG\tn01443537\t0\t0\t1\t1\n")
        with pytest.raises(DualLoRAError, match=r"names 1 of 9 images .* val/images/val_9\.JPEG"):
            streams.load("tiny-imagenet", data=tmp_path)
        annotations.write_text(good)
        (root / "wnids.txt").write_text("n00000000\n")
        with pytest.raises(DualLoRAError, match=r"wnids\.txt names n00000000"):
            streams.load("tiny-imagenet", data=tmp_path)
        (root / "wnids.txt").unlink()
        with pytest.raises(
            DualLoRAError, match=r"tiny-imagenet-200 lacks wnids\.txt of tiny-imagenet: fetch"
        ):
            streams.load("tiny-imagenet", data=tmp_path)

    def test_cub(self, tmp_path: Path) -> None:
        write_cub(tmp_path)
        root = tmp_path / "cub200" / "CUB_200_2011"
        (root / "images.txt").write_text((root / "images.txt").read_text() + "99 gone/a.jpg\n")
        with pytest.raises(DualLoRAError, match="nothing of the class or the split of image 99"):
            streams.load("cub200", data=tmp_path)
        for name, word in (("image_class_labels", "1"), ("train_test_split", "0")):
            path = root / f"{name}.txt"
            path.write_text(path.read_text() + f"99 {word}\n")
        with pytest.raises(DualLoRAError, match=r"names 1 of 16 images .* gone/a\.jpg"):
            streams.load("cub200", data=tmp_path)
        (root / "classes.txt").write_text("lonely\n")
        with pytest.raises(DualLoRAError, match=r"classes\.txt has a line that is not two words"):
            streams.load("cub200", data=tmp_path)

    def test_domainnet(self, tmp_path: Path) -> None:
        write_domainnet(tmp_path)
        path = tmp_path / "domainnet" / "real_test.txt"
        path.write_text(path.read_text() + "real/zebra/real_999.jpg 3\n")
        with pytest.raises(DualLoRAError, match=r"real_test\.txt names 1 of 9 images"):
            streams.load("domainnet", data=tmp_path)
        path.write_text("real_999.jpg 3\n")
        with pytest.raises(DualLoRAError, match=r"line 1 of .*real_test\.txt is not domain/class/file"):
            streams.load("domainnet", data=tmp_path)
        path.unlink()
        with pytest.raises(DualLoRAError, match=r"domainnet lacks real_test\.txt"):
            streams.load("domainnet", data=tmp_path)


class TestDomainSets:
    def test_domainnet_tests_a_class_that_an_earlier_domain_taught(self, tmp_path: Path) -> None:
        write_domainnet(tmp_path)
        stream = streams.load("domainnet", data=tmp_path)
        assert stream.name == "domainnet (domains)"
        painting = stream.tasks[DOMAINNET.index("painting")]
        assert "t-shirt" not in painting.train.classes
        assert "t-shirt" in painting.test.classes
        assert len(painting.test) == 8
        few = streams.load("domainnet", data=tmp_path, classes=2, train_per_class=2)
        assert sorted(few.class_order) == ["The_Eiffel_Tower", "aircraft_carrier"]
        assert [len(task.train) for task in few] == [4] * 6

    def test_core50_divides_the_test_sessions_frame_by_frame(self, tmp_path: Path) -> None:
        write_core50(tmp_path)
        stream = streams.load("core50", data=tmp_path, order="alphabetical")
        frames = [identifier for task in stream for identifier in task.test.identifiers]
        assert len(frames) == len(set(frames)) == 90
        assert {frame.split("/")[0] for frame in frames} == {"s3", "s7", "s10"}
        assert [len(task.test) for task in stream] == [18, 18, 9, 9, 9, 9, 9, 9]
        assert [i for i in stream.tasks[0].test.identifiers if i.startswith("s10/o6/")] == [
            "s10/o6/C_10_06_000.png",
            "s10/o6/C_10_06_008.png",
        ]
        for task in stream:
            assert {i.split("/")[0] for i in task.train.identifiers} == {task.name}

    def test_core50_needs_all_sessions(self, tmp_path: Path) -> None:
        for session in SESSIONS[:4]:
            save(tmp_path / "core50" / f"s{session}" / "o1" / "C_01_01_000.png", 0)
        with pytest.raises(DualLoRAError, match=r"core50 lacks s5, s6, s7 and 4 more of core50: fetch"):
            streams.load("core50", data=tmp_path)

    @pytest.mark.parametrize("real", ["RealWorld", "Real_World", "real-world"])
    def test_office_home_folders_may_be_spelled_otherwise(self, real: str, tmp_path: Path) -> None:
        write_office_home(tmp_path, real=real)
        stream = streams.load("office-home", data=tmp_path)
        assert [task.name for task in stream] == ["Art", "Clipart", "Product", "Real World"]
        assert stream.name == "office-home (seeded 80/20 split) (domains)"
        assert stream.tasks[3].train.identifiers[0].startswith(f"{real}/")

    def test_office_home_without_a_domain_is_refused(self, tmp_path: Path) -> None:
        write_office_home(tmp_path, real="Photos")
        with pytest.raises(DualLoRAError, match="no folder Real World/: fetch OfficeHomeDataset_10072016"):
            streams.load("office-home", data=tmp_path)


class TestNames:
    def test_a_name_wins_over_a_folder_which_its_prefix_reaches(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        write_parts(tmp_path / "digits", ("ant", "bee"))
        monkeypatch.chdir(tmp_path)
        assert len(streams.load("digits").class_order) == 10
        assert streams.load("folder:digits", tasks=2).class_order == ("ant", "bee")
        assert streams.load("./digits", tasks=2).name == "digits"

    @pytest.mark.parametrize(
        ("stream", "message"),
        [
            ("cifar-100", r"did you mean cifar100 or"),
            ("imagenet_r", r"did you mean imagenet-r"),
            ("folder:gone", "gone does not exist"),
            ("folder:", "write folder:PATH"),
            ("hf:NAME:", "cannot be loaded"),
        ],
    )
    def test_what_is_not_there_is_refused(
        self, stream: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        if stream.startswith("hf:"):
            datasets = pytest.importorskip("datasets")
            monkeypatch.setattr(datasets, "load_dataset", lambda *_: 1 / 0)
        monkeypatch.chdir(tmp_path)
        with pytest.raises(DualLoRAError, match=message):
            streams.load(stream)

    def test_streams_of_earlier_versions_are_the_same_byte_for_byte(self) -> None:
        from duallora.runs.protocol import _describe

        usual = _describe(streams.load("digits"))
        assert (usual["name"], usual["order_seed"]) == ("digits", 1993)
        assert usual["sha256"] == "1bae6d240bc35823c03947893224c3b81fa7b770f451277cc2950cf7be05098d"
        three = _describe(streams.load("digits", tasks=3, order="alphabetical"))
        assert three["sha256"] == "8a7b23270534e394c2eb7875d05dff9c19a3273fcead3f13a2355c0f785cb526"
