// For TensorRT's headers where CUDA's are not installed: they use two handles of CUDA's and nothing else of it.
#pragma once

typedef struct CUstream_st* cudaStream_t;
typedef struct CUevent_st* cudaEvent_t;
