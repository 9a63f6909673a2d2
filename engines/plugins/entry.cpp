// The library's entry points. Loading it (`trtexec --plugins`, dlopen, Python's ctypes.CDLL) registers its
// creator; `getCreators` serves IPluginRegistry::loadLibrary, for a registry of a builder or runtime.
#include "plugin_fields.h"

#define STAR_EXPORT __attribute__((visibility("default")))
#define STAR_TENSORRT STAR_TEXT(NV_TENSORRT_MAJOR) "." STAR_TEXT(NV_TENSORRT_MINOR)

namespace {

bool const registered =
    getPluginRegistry() != nullptr && getPluginRegistry()->registerCreator(star::creator(), "");

}  // namespace

extern "C" {

// engines/plugins/__init__.py reads this marker from the file's bytes before it loads the library.
STAR_EXPORT extern char const star_plugin_marker[];
char const star_plugin_marker[] = "star-plugin abi=" STAR_TEXT(STAR_ABI) " tensorrt=" STAR_TENSORRT ";";

// Whether a write since the last call did not fit its cache. Wait for the stream before asking.
STAR_EXPORT int star_plugin_take_overflow()
{
    int *host = nullptr, *device = nullptr;
    if (star::overflow_flag(&host, &device) != 0 || host == nullptr) return 0;
    int const raised = *static_cast<int volatile*>(host);
    *host = 0;
    return raised;
}

// Whether TensorRT accepted the creator when the library was loaded.
STAR_EXPORT int star_plugin_registered() { return registered; }

STAR_EXPORT void setLoggerFinder(nvinfer1::ILoggerFinder*) {}

STAR_EXPORT nvinfer1::IPluginCreatorInterface* const* getCreators(int32_t& count)
{
    static nvinfer1::IPluginCreatorInterface* const creators[] = {&star::creator()};
    count = 1;
    return creators;
}

}  // extern "C"
