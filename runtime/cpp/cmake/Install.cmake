# What `cmake --install` puts where: the program, the library, its headers, and how CMake and pkg-config find them.
include(CMakePackageConfigHelpers)

set(package ${CMAKE_INSTALL_LIBDIR}/cmake/sana_runtime)
install(TARGETS sana sana_runtime EXPORT sana_runtimeTargets)
install(DIRECTORY include/ DESTINATION ${CMAKE_INSTALL_INCLUDEDIR})
install(EXPORT sana_runtimeTargets NAMESPACE sana:: DESTINATION ${package})

configure_package_config_file(cmake/sana_runtimeConfig.cmake.in ${CMAKE_CURRENT_BINARY_DIR}/sana_runtimeConfig.cmake INSTALL_DESTINATION ${package})
write_basic_package_version_file(${CMAKE_CURRENT_BINARY_DIR}/sana_runtimeConfigVersion.cmake COMPATIBILITY SameMinorVersion)
install(FILES ${CMAKE_CURRENT_BINARY_DIR}/sana_runtimeConfig.cmake ${CMAKE_CURRENT_BINARY_DIR}/sana_runtimeConfigVersion.cmake DESTINATION ${package})

# From the folder of the .pc file to the prefix, so that what is installed may be moved.
set(pkgconfig ${CMAKE_INSTALL_LIBDIR}/pkgconfig)
file(RELATIVE_PATH SANA_PREFIX_FROM_PC /prefix/${pkgconfig} /prefix)
configure_file(cmake/sana_runtime.pc.in ${CMAKE_CURRENT_BINARY_DIR}/sana_runtime.pc @ONLY)
install(FILES ${CMAKE_CURRENT_BINARY_DIR}/sana_runtime.pc DESTINATION ${pkgconfig})
