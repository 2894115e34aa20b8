"""From calibration images to expert files: one method after the other, each expert an ONNX file and a certificate.

Unlike the language methods these learn by gradients, each from its own runs over the images, so nothing is shared
between experts but the folded network. An expert whose certificate is there is whole and is not made again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from moqe.data.images import ImageSamples, PreparedImages
from moqe.folder import MixtureFolder
from moqe.methods.certificate import certify
from moqe.methods.vision import VISION_METHODS, Job
from moqe.progress import Progress
from moqe.recipe import Expert, Recipe
from moqe.router.features import Features
from moqe.schemes import Scheme
from moqe.store import write_json
from moqe.tasks.image_expert_files import expert_file, records, write_expert
from moqe.tasks.image_models import ImageModels
from moqe.tasks.image_specialists import ImageSpecialists

BASELINE = "ptq"


class ImageExpertMaker:
    """Makes the experts of a recipe in a mixture's folder. schemes: the number format of every expert."""

    def __init__(
        self, recipe: Recipe, schemes: Mapping[str, Scheme], models: ImageModels, folder: MixtureFolder
    ) -> None:
        self.recipe, self.schemes, self.models, self.folder = recipe, schemes, models, folder

    def run(self, samples: ImageSamples, features: Callable[[], Features], progress: Progress) -> None:
        """Make every expert that is not complete, those of `specialists` last.

        features: what the router sees of the samples. Raises what methods, formats and the models raise.
        """
        for expert in self.recipe.experts:
            if expert not in self.recipe.family and not self.folder.certificate(expert.name).exists():
                self._make(expert, samples, progress)
        if self.recipe.family:
            family = ImageSpecialists(self.recipe, self.schemes, self.models, self.folder, samples, features)
            family.run(progress)

    def _make(self, expert: Expert, samples: ImageSamples, progress: Progress) -> None:
        folded, scheme = self.models.folded(expert.name), self.schemes[expert.name]
        images = PreparedImages(samples, folded.classifier.preprocessing, folded.example.device)
        job = Job(folded.network, folded.sites, folded.blocks, images, scheme, expert, self.recipe.seed, progress)
        result = VISION_METHODS[expert.method].fit(job)
        certificate = certify(
            expert, records(expert, scheme, folded.sites, result, len(images)), calibrated=expert.method != BASELINE
        )
        write_expert(expert_file(self.folder.expert(expert.name)), folded, result, expert)
        write_json(self.folder.certificate(expert.name), certificate.to_json())
