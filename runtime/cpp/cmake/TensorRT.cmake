# sana_tensorrt_headers: the headers of the user's TensorRT or TensorRT for RTX. SANA_TENSORRT_FOUND says whether they were found.
# SANA_TENSORRT_RTX_API, 0 or 1, says whether they have what only TensorRT for RTX has: a cache of compiled kernels, a strategy for
# dynamic shapes, and a diagnosis of engines. Without, libsana_runtime compiles all the same, and `sana --version` says it.
# No library is linked: TensorRT, CUDA's driver and cuBLASLt are opened when they are first needed.
set(SANA_TENSORRT_ROOT "$ENV{TENSORRT_ROOT}" CACHE PATH "The folder of a TensorRT or TensorRT for RTX SDK, with include/NvInferRuntime.h in it")

if(SANA_TENSORRT_ROOT)  # one that was named is used, or it is an error
    find_path(SANA_TENSORRT_INCLUDE NvInferRuntime.h PATHS ${SANA_TENSORRT_ROOT} PATH_SUFFIXES include NO_DEFAULT_PATH)
    if(NOT SANA_TENSORRT_INCLUDE)
        message(FATAL_ERROR "TensorRT: got ${SANA_TENSORRT_ROOT}, which has no include/NvInferRuntime.h; expected the folder of a "
            "TensorRT or TensorRT for RTX SDK. Set TENSORRT_ROOT or -DSANA_TENSORRT_ROOT to it, or leave both empty.")
    endif()
else()
    find_path(SANA_TENSORRT_INCLUDE NvInferRuntime.h)
endif()

set(SANA_TENSORRT_FOUND FALSE)
if(SANA_TENSORRT_INCLUDE)
    file(STRINGS ${SANA_TENSORRT_INCLUDE}/NvInferVersion.h lines REGEX "^#define (TRT|NV_TENSORRT)_MAJOR[A-Z_]* [0-9]+")
    string(REGEX MATCH "MAJOR[A-Z_]* ([0-9]+)" unused "${lines}")
    set(SANA_TENSORRT_FOUND TRUE)
    message(STATUS "TensorRT headers: ${SANA_TENSORRT_INCLUDE}, version ${CMAKE_MATCH_1}")
    add_library(sana_tensorrt_headers INTERFACE)
    target_include_directories(sana_tensorrt_headers SYSTEM INTERFACE ${SANA_TENSORRT_INCLUDE})
    find_path(SANA_CUDA_INCLUDE cuda_runtime_api.h PATHS /usr/local/cuda PATH_SUFFIXES include)
    if(SANA_CUDA_INCLUDE)
        target_include_directories(sana_tensorrt_headers SYSTEM INTERFACE ${SANA_CUDA_INCLUDE})
    else()
        target_include_directories(sana_tensorrt_headers SYSTEM INTERFACE ${CMAKE_CURRENT_LIST_DIR}/../../../plugins/cpp/include_cuda)
    endif()
    include(CheckCXXSourceCompiles)
    get_target_property(CMAKE_REQUIRED_INCLUDES sana_tensorrt_headers INTERFACE_INCLUDE_DIRECTORIES)
    check_cxx_source_compiles("
        #include <NvInferRuntime.h>
        int main() {
            nvinfer1::IRuntimeConfig* config = nullptr;
            nvinfer1::IRuntime* runtime = nullptr;
            nvinfer1::IRuntimeCache* cache = config->createRuntimeCache();
            config->setRuntimeCache(*cache);
            config->setDynamicShapesKernelSpecializationStrategy(nvinfer1::DynamicShapesKernelSpecializationStrategy::kEAGER);
            std::uint64_t flags = static_cast<std::uint64_t>(nvinfer1::EngineInvalidityDiagnostics::kMALFORMED_ENGINE);
            return cache->deserialize(nullptr, 0) && runtime->getEngineValidity(nullptr, 0, &flags) == nvinfer1::EngineValidity::kVALID;
        }" SANA_TENSORRT_HAS_RTX_API)
    set(CMAKE_REQUIRED_INCLUDES)
    set(SANA_TENSORRT_RTX_API 0)
    if(SANA_TENSORRT_HAS_RTX_API)
        set(SANA_TENSORRT_RTX_API 1)
    endif()
    message(STATUS "TensorRT for RTX's kernel cache: ${SANA_TENSORRT_RTX_API}")
else()
    message(STATUS "TensorRT headers: none found, so what needs them is left out. Set TENSORRT_ROOT or -DSANA_TENSORRT_ROOT to the "
        "folder of a TensorRT or TensorRT for RTX SDK.")
endif()
