# sana_tensorrt_headers: the headers of the user's TensorRT or TensorRT for RTX. SANA_TENSORRT_FOUND says whether they were found.
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
else()
    message(STATUS "TensorRT headers: none found, so what needs them is left out. Set TENSORRT_ROOT or -DSANA_TENSORRT_ROOT to the "
        "folder of a TensorRT or TensorRT for RTX SDK.")
endif()
