/* What the shared library shows. */
#ifndef SANA_EXPORT_H
#define SANA_EXPORT_H

#if defined(__GNUC__)
#define SANA_EXPORT __attribute__((visibility("default")))
#else
#define SANA_EXPORT
#endif

#endif
