// Runs a model that `python analyze/export.py --out model.aoti.pt2` has written, without Python.
//
//     predict model.aoti.pt2 images.f32 BATCH CHANNELS HEIGHT WIDTH
//
// images.f32 holds the numbers of the images, float32, normalised as model.aoti.pt2.json says. Prints the logits, one image
// a line. docs/deployment.md tells how to build it.

#include <torch/csrc/inductor/aoti_package/model_package_loader.h>
#include <torch/types.h>

#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <vector>

int main(int count, char** arguments) try {
    if (count != 7) {
        std::fprintf(stderr, "usage: %s model.aoti.pt2 images.f32 BATCH CHANNELS HEIGHT WIDTH\n", arguments[0]);
        return 2;
    }
    std::vector<int64_t> shape;
    for (int i = 3; i < 7; i++) shape.push_back(std::atoll(arguments[i]));
    torch::Tensor images = torch::empty(shape);

    std::ifstream file(arguments[2], std::ios::binary);
    const auto bytes = static_cast<std::streamsize>(images.numel() * sizeof(float));
    if (!file.read(reinterpret_cast<char*>(images.data_ptr<float>()), bytes)) {
        std::fprintf(stderr, "error: %s does not hold %lld numbers\n", arguments[2], (long long)images.numel());
        return 2;
    }

    const c10::InferenceMode inference;
    torch::inductor::AOTIModelPackageLoader model(arguments[1]);
    const torch::Tensor logits = model.run({images})[0].contiguous();

    for (int64_t image = 0; image < logits.size(0); image++) {
        const float* row = logits.data_ptr<float>() + image * logits.size(1);
        for (int64_t i = 0; i < logits.size(1); i++) std::printf(i ? " %.9g" : "%.9g", row[i]);
        std::printf("\n");
    }
    return 0;
} catch (const std::exception& error) {
    std::fprintf(stderr, "error: %.300s\n", error.what());
    return 1;
}
