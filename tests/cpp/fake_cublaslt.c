/* As much of cuBLASLt as the plugins use: writes what it is told to stdout. FAKE_LT_0, FAKE_LT_3: what the heuristic answers for a
   scale a matrix, and a row, as "number:waves:workspace ..."; FAKE_LT_CHECK, FAKE_LT_REFUSES: numbers, such as " 2 5 ", that are
   refused when they are checked, and when they are run. */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define FAKE __attribute__((visibility("default")))

typedef struct {
    uint64_t algo[8];
    size_t workspace;
    int32_t state;
    float waves;
    int32_t reserved[4];
} Heuristic;

static int made = 0;
static int32_t mode = -1; /* of scales, as the description has it last */

static void* thing(void) { return (void*)(intptr_t)++made; }
static const char* asked(const char* name) { return getenv(name) != NULL ? getenv(name) : ""; }
static int listed(const char* name, uint64_t number) {
    char word[32];
    return snprintf(word, sizeof word, " %llu ", (unsigned long long)number), strstr(asked(name), word) != NULL;
}

FAKE int cublasLtCreate(void** handle) { return *handle = thing(), 0; }
FAKE int cublasLtMatmulDescCreate(void** description, int compute, int scale) {
    return *description = thing(), printf("product %d %d\n", compute, scale), 0;
}
FAKE int cublasLtMatmulDescDestroy(void* description) { return (void)description, 0; }
FAKE int cublasLtMatmulDescSetAttribute(void* description, int attribute, const void* value, size_t size) {
    unsigned long long number = 0;
    (void)description, memcpy(&number, value, size);
    if (attribute == 31 || attribute == 32) mode = (int32_t)number;
    return printf("attribute %d %llu of %zu bytes\n", attribute, number, size), 0;
}
FAKE int cublasLtMatrixLayoutCreate(void** layout, int type, uint64_t rows, uint64_t columns, int64_t stride) {
    printf("layout %d %llu %llu %lld\n", type, (unsigned long long)rows, (unsigned long long)columns, (long long)stride);
    return *layout = thing(), 0;
}
FAKE int cublasLtMatrixLayoutDestroy(void* layout) { return (void)layout, 0; }
FAKE int cublasLtMatmulPreferenceCreate(void** preference) { return *preference = thing(), 0; }
FAKE int cublasLtMatmulPreferenceDestroy(void* preference) { return (void)preference, 0; }
FAKE int cublasLtMatmulPreferenceSetAttribute(void* preference, int attribute, const void* value, size_t size) {
    unsigned long long number = 0;
    (void)preference, memcpy(&number, value, size);
    return printf("preference %d %llu\n", attribute, number), 0;
}

static int answers(int32_t of, Heuristic* found, int most) {
    char name[16], text[256];
    int count = 0;
    snprintf(name, sizeof name, "FAKE_LT_%d", of);
    snprintf(text, sizeof text, "%s", asked(name));
    for (char* word = strtok(text, " "); word != NULL && count < most; word = strtok(NULL, " "), ++count) {
        unsigned long long number = 0, workspace = 0;
        float waves = 0;
        sscanf(word, "%llu:%f:%llu", &number, &waves, &workspace);
        found[count] = (Heuristic){.algo = {number}, .workspace = (size_t)workspace, .waves = waves};
    }
    return count;
}

FAKE int cublasLtMatmulAlgoGetHeuristic(void* handle, void* description, void* a, void* b, void* c, void* d, void* preference, int most,
                                        Heuristic* found, int* count) {
    (void)handle, (void)description, (void)a, (void)b, (void)c, (void)d, (void)preference;
    *count = answers(mode, found, most);
    return printf("heuristic %d of %d\n", mode, most), 0;
}
FAKE int cublasLtMatmulAlgoCheck(void* handle, void* description, void* a, void* b, void* c, void* d, const uint64_t* algo, Heuristic* found) {
    Heuristic named[8];
    (void)handle, (void)description, (void)a, (void)b, (void)c, (void)d;
    printf("check %llu for %d\n", (unsigned long long)algo[0], mode);
    for (int i = answers(0, named, 8); i-- > 0;) {
        if (named[i].algo[0] == algo[0]) *found = named[i];
    }
    memset(found->algo, 0, sizeof found->algo); /* cublasLt.h does not say that it is filled in */
    return listed("FAKE_LT_CHECK", algo[0]) ? 15 : 0;
}
FAKE int cublasLtMatmul(void* handle, void* description, const float* alpha, const void* a, void* la, const void* b, void* lb,
                        const float* beta, const void* c, void* lc, void* d, void* ld, const uint64_t* algo, void* workspace,
                        size_t size, void* stream) {
    (void)handle, (void)description, (void)la, (void)lb, (void)lc, (void)ld;
    printf("multiply %g %p %p %g %p %p by %llu, %p of %zu, stream %d\n", (double)*alpha, a, b, (double)*beta, c, d,
           (unsigned long long)algo[0], workspace, size, stream == (void*)7);
    return listed("FAKE_LT_REFUSES", algo[0]) ? 15 : 0;
}
