from compiled_machine import CompiledKindsMachine, FastCompiledKindsMachine

TestPeft = CompiledKindsMachine.TestCase
TestFast = FastCompiledKindsMachine.TestCase
