// The library for ONNX Runtime: operators of the domain "ssm_ops" in float32 on the CPU, over the kernels of csrc/cpu.
//
// A session takes it by `register_custom_ops_library`, which calls RegisterCustomOps. Every node carries the version of
// the operators that it was written for, and a session that meets another one is not made.

#include "image_scan.h"
#include "sequence.h"

#define SSM_EXPORTED extern "C" __attribute__((visibility("default")))

namespace ssm {

const OrtApi* api = nullptr;

struct Attributes {
    const OrtKernelInfo* info;
    int64_t integer(const char* name) const {
        int64_t value = 0;
        require(api->KernelInfoGetAttribute_int64(info, name, &value));
        return value;
    }
};

static OrtStatus* failed(const char* operation, const std::exception& error) {
    return api->CreateStatus(ORT_FAIL, (std::string(DOMAIN_NAME) + "::" + operation + ": " + error.what()).c_str());
}

// `Operator` as the structure of functions that ONNX Runtime calls.
template <typename Operator>
struct Registered : OrtCustomOp {
    Registered() : OrtCustomOp{} {
        version = API_VERSION;
        GetName = [](const OrtCustomOp*) { return Operator::name; };
        GetExecutionProviderType = [](const OrtCustomOp*) -> const char* { return nullptr; };
        GetInputTypeCount = [](const OrtCustomOp*) { return Operator::inputs; };
        GetInputType = [](const OrtCustomOp*, size_t) { return ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT; };
        GetOutputTypeCount = [](const OrtCustomOp*) -> size_t { return 1; };
        GetOutputType = [](const OrtCustomOp*, size_t) { return ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT; };
        GetInputCharacteristic = [](const OrtCustomOp*, size_t) { return INPUT_OUTPUT_REQUIRED; };
        GetOutputCharacteristic = [](const OrtCustomOp*, size_t) { return INPUT_OUTPUT_REQUIRED; };
        GetInputMemoryType = [](const OrtCustomOp*, size_t) { return OrtMemTypeDefault; };
        GetStartVersion = [](const OrtCustomOp*) { return 1; };
        GetEndVersion = [](const OrtCustomOp*) { return 1; };
        CreateKernelV2 = create;
        KernelComputeV2 = compute;
        KernelDestroy = [](void* kernel) { delete static_cast<Operator*>(kernel); };
    }

    static OrtStatus* create(const OrtCustomOp*, const OrtApi*, const OrtKernelInfo* info, void** kernel) {
        try {
            const Attributes attributes{info};
            const int64_t wanted = attributes.integer("version");
            expect(wanted == OPS_VERSION, "the file needs version " + std::to_string(wanted) +
                                              " of these operators, this library has " + std::to_string(OPS_VERSION) +
                                              ": export the model again");
            *kernel = new Operator(attributes);
            return nullptr;
        } catch (const std::exception& error) {
            return failed(Operator::name, error);
        }
    }

    static OrtStatus* compute(void* kernel, OrtKernelContext* context) {
        try {
            static_cast<const Operator*>(kernel)->run(Call(context));
            return nullptr;
        } catch (const std::exception& error) {
            return failed(Operator::name, error);
        }
    }
};

template <typename Operator>
static void add(OrtCustomOpDomain* domain) {
    static const Registered<Operator> registered;
    require(api->CustomOpDomain_Add(domain, &registered));
}

}  // namespace ssm

SSM_EXPORTED int64_t ssm_ops_onnxruntime_version() { return ssm::OPS_VERSION; }

SSM_EXPORTED OrtStatus* RegisterCustomOps(OrtSessionOptions* options, const OrtApiBase* base) {
    using namespace ssm;
    api = base->GetApi(API_VERSION);
    if (api == nullptr)  // there is no way to make a status without it
        return base->GetApi(1)->CreateStatus(ORT_FAIL, "ssm_ops needs onnxruntime 1.17 or later");
    static OrtCustomOpDomain* domain = nullptr;  // lives as long as the sessions, that is, as the library
    try {
        if (domain == nullptr) {
            OrtCustomOpDomain* made = nullptr;
            require(api->CreateCustomOpDomain(DOMAIN_NAME, &made));
            add<SS2DScan>(made), add<BidirectionalScan>(made), add<SelectiveScan>(made), add<CausalConv1d>(made);
            domain = made;
        }
        require(api->AddCustomOpDomain(options, domain));
        return nullptr;
    } catch (const std::exception& error) {
        return failed("RegisterCustomOps", error);
    }
}
